"""What evaluating a node can end in; plain integers, so that numba kernels can return them."""

BRANCH = 0
"""Two children are needed."""
CLOSED = 1
"""The bound reached the cutoff, or no set is left."""
LEAF = 2
"""Every index is decided."""
FAILED = 3
"""A factorisation failed: the kept block is singular to working precision."""
