"""Checks of the claims on reproducibility: trains in every way that the documentation names, and compares digests."""
