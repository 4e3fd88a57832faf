"""Fine-tuning on tasks."""
