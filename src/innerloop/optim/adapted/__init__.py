"""Any other ``torch.optim.Optimizer``, made differentiable by running its own ``step``."""

from innerloop.optim.adapted.rule import Adapted, AdaptedState, adapt

__all__ = ["Adapted", "AdaptedState", "adapt"]
