"""``track``: differentiate through a hand-written loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from innerloop._track.loop import TrackedLoop
from innerloop._track.replayed_loop import ReplayedLoop, checked_times
from innerloop._track.start import Learn, Model, TorchOptimizer, check_save_at
from innerloop._types import Params
from innerloop._unroll import check_strategy
from innerloop.optim._base import Optimizer
from innerloop.strategy._base import Strategy


def track(
    model: Model,
    optimizer: TorchOptimizer | Optimizer,
    learn: Learn = "init",
    params: Params | None = None,
    hyper: Mapping[str, object] | None = None,
    first_order: bool = False,
    *,
    strategy: Strategy | None = None,
    save_at: Sequence[int] = (),
) -> TrackedLoop:
    r"""Make the steps of a training loop differentiable.

    Inside the block ``loop.model`` stands for ``model``, and ``loop.step(loss)`` for
    ``loss.backward(); optimizer.step()``. Neither the model nor the optimizer is changed; what is
    computed from ``loop.model`` can be differentiated through all steps.

    Args:
        model: a module, or a dict of modules (``loop.model`` is then a dict, and names get the key
            in front: ``"actor.0.weight"``).
        optimizer: its rule, groups, settings, state: a ``torch.optim`` optimizer over (part of) the
            model's parameters, a list of them, or one of `innerloop.optim` over all parameters that
            require grad. A scheduler may change it between steps.
        learn: ``"init"``: the outer gradient reaches ``model.parameters()`` and tensors outside of
            the model; ``"outer"``: only tensors outside of the model (hyper-parameters, data,
            another network); ``"nothing"``: evaluation, memory does not grow.
        params: tensors that take the place of parameters at time 0, by name; gradients flow to
            them.
        hyper: hyper-parameters of the optimizer by name, as tensors: one for all groups, or a list
            with one per group; also a mapping from parameter names to tensors.
        first_order: treat the inner gradients as constants, but keep
            :math:`\partial\theta_{t+1}/\partial\theta_t = I` and what the rule itself adds:
            ``.grad`` is the gradient of first-order MAML (Finn et al. 2017), exact if the inner
            loss is linear. `unroll` does the same with the strategy `FirstOrder`.
        strategy: None, or `StoreAll`, keeps the graph of every step; `FirstOrder` is
            ``first_order=True``. `Checkpointed` (its ``slots``, ``memory`` of the states alone,
            ``offload`` and ``compile``) keeps some of the states, and runs each step again in the
            backward pass: ``loop.step`` then needs a function that computes the loss,
            ``loop.step(lambda: loss_fn(loop.model(x), y))`` or ``loop.step(fn, args=(x, y))``. The
            gradients are the same. `Truncated` does so for the last steps, those before the moment
            at which the backward pass begins; what is learned must act along the loop
            (``learn="outer"``).
            Second derivatives of the outer loss are refused under both.
        save_at: with a strategy, the times whose states ``loop.at(t)`` returns, besides the start
            and the newest.

    Returns:
        A `TrackedLoop`, to be used in a ``with`` statement.

    Raises:
        InvalidInputError: the optimizer steps tensors that are not in the model or has no
            hyper-parameter of a given name; a name or shape does not fit.

    Note:
        A weight of ``loop.model`` is edited by ``loop.assign``, with its derivative. Adding a
        constant in place, under ``torch.no_grad``, is right too if it is done from the first step
        on; other edits under ``no_grad`` or ``.data`` are refused (``learn="nothing"`` takes all).
        Assigning a new ``nn.Parameter`` cuts the gradient there, and the loop then trains that one
        (PyTorch's optimizer would go on with the old one). Frozen parameters are shared with
        ``model``, not copied: do not edit those in place. Running statistics are constants of the
        derivative, as in PyTorch; a buffer that requires grad is not. What is frozen, the param
        groups and the hooks are read once: a change of them inside the block is refused.

        A parameter that the loss does not use is skipped, as after ``backward()``: weight decay and
        momentum do not move it. (In `unroll` its gradient is zero, and they do.) Sparse gradients
        are made dense, except for ``SparseAdam``.

        Under a strategy the values that a function reads when ``loop.step`` is called (its
        variables, late-bound ones too, and the globals of its module) are noted for its next run;
        data that it reaches otherwise (an attribute of an object, an iterator, memory that was
        overwritten) must be the same then: each loss is compared with that of the forward pass, to
        the last bit on the CPU, and an error names the step. With ``compile=True`` one step and its
        pullback are compiled for each such function, however often it is defined anew, and compared
        with uncompiled code; numbers among its variables are compiled in, and it may only compute.

    Cost:
        About 3 gradients per step, and the memory of T graphs: as `StoreAll`. Under `Checkpointed`
        up to twice the time, and the memory of about :math:`2\sqrt T` states, some 15 kB a step,
        and graphs of at most 16 MB, or of one step.

    Example:
        Two steps with rate .5 on w²/2, and the outer loss w₂²/2: the meta-gradient is (1 - .5)⁴ w₀.

        >>> import torch, innerloop
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 4.0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> x = torch.ones(1, 1)
        >>> with innerloop.track(model, optimizer) as loop:
        ...     for _ in range(2):
        ...         _ = loop.step(loop.model(x).square().mean() / 2)
        ...     outer = loop.model(x).square().mean() / 2
        >>> outer.backward()
        >>> model.weight.grad
        tensor([[0.2500]])
    """
    if strategy is None or learn == "nothing":
        check_save_at(save_at, learn)
        return TrackedLoop(model, optimizer, learn, params, hyper, first_order)
    check_strategy(strategy)
    kept = strategy.kept_graphs()
    if kept is not None:
        # Every time is kept: there is nothing to choose among.
        checked_times(save_at)
        first_order = first_order or kept.first_order
        return TrackedLoop(model, optimizer, learn, params, hyper, first_order)
    return ReplayedLoop(model, optimizer, learn, params, hyper, first_order, strategy, save_at)
