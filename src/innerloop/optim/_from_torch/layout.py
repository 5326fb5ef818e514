"""Where ``torch.optim`` keeps what an update rule needs from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TorchLayout:
    """The optimizer of ``torch.optim`` that a rule is equal to, and how that one keeps its state.

    Attributes:
        torch_class: the optimizer.
        state: field of the rule's state -> key in ``optimizer.state[p]``.
        count: the key of the number of steps; None if the optimizer does not keep it.
        count_type: a 0-dim tensor, or an int.
        shared: True if the optimizer keeps one state for all parameters, with the first of them.
        from_constructor: settings that the optimizer takes from its constructor, whatever a param
            group says.
    """

    torch_class: type[torch.optim.Optimizer]
    state: Mapping[str, str]
    count: str | None = "step"
    count_type: type = Tensor
    shared: bool = False
    from_constructor: tuple[str, ...] = ()
