"""Runs and their evaluations as one page, tables and figures."""
