"""Sources of text and their readers."""
