"""How results are shown: words, tables, pictures and pages. Knows nothing of what it shows."""
