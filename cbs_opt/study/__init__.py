"""Studies: instances x formulations x solvers x parameter grids x seeds, run apart, kept, reported."""
