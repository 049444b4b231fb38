"""Bounds and their files."""
