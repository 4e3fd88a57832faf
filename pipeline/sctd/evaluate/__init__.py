"""The paper's experiments on checkpoints: fine-tuning, probing, drift, ablations."""
