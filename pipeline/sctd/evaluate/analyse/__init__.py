"""What layers know, and how meaning drifts: probing and semantic drift."""
