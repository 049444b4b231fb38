"""``H = R^T R + C + damping I`` as a linear operator: no network, no program."""
