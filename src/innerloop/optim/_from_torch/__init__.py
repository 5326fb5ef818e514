"""Optimizers of ``torch.optim``, read in and written back."""
