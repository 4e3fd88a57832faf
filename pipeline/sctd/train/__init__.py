"""The run: processes, engine, loop, checkpoints, monitoring and export."""
