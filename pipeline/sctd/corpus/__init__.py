"""Raw text to packed token shards: sources, tokenizer, packing, manifest. Runs once, before training."""
