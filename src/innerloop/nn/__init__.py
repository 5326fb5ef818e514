"""Modules and functions of ``torch.nn`` with the derivatives that differentiating through training needs."""

from innerloop.nn import functional

__all__ = ["functional"]
