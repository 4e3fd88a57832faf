"""Shards -> batches. Order, masks and cursor are pure functions of (seed, global sample index)."""
