"""What a run leaves on disk: its folder, checkpoints, attempts and exports."""
