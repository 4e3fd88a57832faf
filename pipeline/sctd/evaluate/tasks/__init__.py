"""Tasks and their rows, from files or the hub."""
