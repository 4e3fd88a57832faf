"""Jobs on clusters: where they stand, whether a machine can train, and the proof that resume is exact."""
