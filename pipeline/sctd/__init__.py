"""sctd: BERT pretraining with token dropping and semantic-consistent token dropping on a DeepSpeed engine."""

__version__ = "0.1.0"
