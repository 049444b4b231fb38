"""Swap search on the selection program."""
