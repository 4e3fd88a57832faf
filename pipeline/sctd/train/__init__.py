"""The run: processes, engine, loop, checkpoints, monitoring and export."""

import os

import torch

if not torch.cuda.is_available():  # DeepSpeed decides on its accelerator when it is imported, and warns when unsure
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
