"""The loss and its gradient at the parameters that an update rule asks for."""

from __future__ import annotations

from torch import Tensor

from innerloop._types import Grads, Named, Params, ValueAndGrad


class CachedFirstEvaluation:
    """The loss and its gradient at the parameters that a rule asks for.

    The first evaluation, at the parameters before the step, is known already. It is handed out
    once, so that random numbers are drawn, and running statistics written, as often as
    ``torch.optim`` calls its closure.

    Args:
        evaluate: params -> (loss, gradients).
        params: where the step starts.
        loss, grads: the evaluation there.
    """

    def __init__(self, evaluate: ValueAndGrad, params: Named, loss: Tensor, grads: Grads) -> None:
        self._evaluate = evaluate
        self._params = params
        self._known: tuple[Tensor, Grads] | None = (loss, grads)

    def __call__(self, params: Params) -> tuple[Tensor, Grads]:
        known, self._known = self._known, None
        if known is not None and all(params[name] is p for name, p in self._params.items()):
            return known
        return self._evaluate(params)
