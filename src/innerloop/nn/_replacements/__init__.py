"""Replacements for operations of PyTorch that lack a derivative, or have a wrong one."""
