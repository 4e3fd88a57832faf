"""From sources to packed shards, on one process or many ranks."""
