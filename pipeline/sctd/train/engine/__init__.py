"""The DeepSpeed engine of a run: processes, devices, optimizers, and the state that ranks hold."""
