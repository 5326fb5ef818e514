"""Transforms of the gradient, one file each."""
