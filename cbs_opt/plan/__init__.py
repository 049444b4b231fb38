"""Sizes of a run before it starts."""
