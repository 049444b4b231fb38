"""Selectors of the joint program, with their linear algebra."""
