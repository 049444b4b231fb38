"""Blocks over processes."""
