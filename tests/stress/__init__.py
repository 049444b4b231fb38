"""Checks that are run by hand with a number of cases and a seed; a small share of each is in the suite."""
