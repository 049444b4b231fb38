"""Exact solution of both programs on one block by branch and bound."""

from formulations.branch_and_bound.driver import branch_and_bound

__all__ = ["branch_and_bound"]
