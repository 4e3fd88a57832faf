"""BERT, its token-dropping wrapper, its heads and its conversion to and from transformers."""
