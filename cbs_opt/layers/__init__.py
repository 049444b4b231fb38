"""Networks pruned layer by layer, block after block, by what each layer is fed: language models."""
