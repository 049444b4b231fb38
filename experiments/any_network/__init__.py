"""Kinds of networks and batches that `prune` takes, or refuses by name."""
