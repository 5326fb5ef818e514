"""Differentiate through a hand-written loop."""
