"""Helpers that would make sense in a library that has never heard of training loops."""
