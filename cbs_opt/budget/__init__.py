"""From sparsity to pruned counts."""
