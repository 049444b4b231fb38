"""Timed comparisons, one command each."""
