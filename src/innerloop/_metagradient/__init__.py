"""The gradient of an outer loss with respect to what stands before or inside a loop."""
