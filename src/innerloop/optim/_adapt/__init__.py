"""Any other optimizer class, made differentiable by running its own ``step``."""
