"""The run: engine, loop, what it keeps on disk, its FLOPs, and its submission as a SLURM job."""

import os

import torch

if not torch.cuda.is_available():  # DeepSpeed decides on its accelerator when it is imported, and warns when unsure
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
