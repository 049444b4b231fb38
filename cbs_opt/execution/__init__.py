"""Blocks over processes: joblib, with its loky, Dask and Ray backends."""
