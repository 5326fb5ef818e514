"""Treat the inner gradients as constants."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._inner_gradient.gradient import check_graph, inner_gradient
from innerloop._inner_gradient.loss import INDEPENDENT
from innerloop._inner_gradient.torch_errors import explain
from innerloop._module.checks import refusing_recomputation, refusing_writes
from innerloop._problem import Problem
from innerloop._trajectory import Trajectory
from innerloop._types import HyperTree
from innerloop._utils import tree
from innerloop._utils.execution import may_call_autograd
from innerloop.errors import InnerLoopError, NotDifferentiableError
from innerloop.strategy._base import KeptGraphs, Loop, Measure, StepOutputs, Strategy
from innerloop.strategy._engine.guards import check_constants, refuse_inputs, refuse_outputs
from innerloop.strategy._engine.step_pullback import state_of
from innerloop.strategy._forecast import Forecast


@dataclasses.dataclass(frozen=True)
class FirstOrder(Strategy):
    r"""Treat the gradient of each inner step as a constant: no second derivative. Approximate.

    .. math::
        (\theta_{t+1}, s_{t+1}) = u(g_t, s_t, \theta_t, \lambda),
        \qquad g_t = \nabla_\theta \ell(\theta_t) \text{ held constant}

    For SGD :math:`d\theta_T / d\theta_0` is then the identity: first-order MAML (Finn et al.,
    "Model-agnostic meta-learning", 2017). Hyper-parameters of the optimizer keep their direct
    effect on each update. The error is of the order of η T times the curvature of the inner loss;
    exact where that is zero, and in the limit of small steps.

    **Cost**: T G in time; memory A, plus P per step for each hyper-parameter of the optimizer that
    is learned (and for Adam's division).

    **When**: few and small inner steps, as a cheap first try. **Not** for a hyper-parameter inside
    the inner loss: it acts through the inner gradients alone, so asking for its gradient raises.
    Nor for outer losses made of ``traj.losses`` or ``traj.aux``.

    ``track(..., first_order=True)`` does the same to a hand-written loop, and so does this strategy
    given to ``track``.

    Example:
        On the loss w²/2 every step multiplies w by 1 - lr. Exact: d w₃/d w₀ = (1 - lr)³ = 1/8; with
        constant gradients it is 1.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> traj = innerloop.unroll(
        ...     problem, {"w": w}, None, steps=3, strategy=innerloop.FirstOrder()
        ... )
        >>> torch.autograd.grad(traj.params["w"], w)
        (tensor(1.),)
    """

    exact = False
    differentiates: ClassVar[frozenset[str]] = frozenset({"params", "hyper"})

    def kept_graphs(self) -> KeptGraphs:
        """Return that `track` keeps those of the updates alone."""
        return KeptGraphs(first_order=True)

    def run(self, loop: Loop) -> Trajectory:
        carry = loop.start
        states, rows = {0: carry}, StepOutputs(carry.params)
        view = loop.problem.view
        # A buffer that requires grad acts through the inner gradients too.
        in_loss: dict[int, Tensor] = {
            id(b): b
            for name, b in loop.start.buffers.items()
            if b.requires_grad and view is not None and name in view.no_statistics
        }
        quiet = loop.as_constants()
        for t in loop.batches.times():
            batch = quiet.batch(carry.detach(), t)
            grads, loss, aux, buffers = _constant_gradient(
                quiet.problem, carry, loop.hyper, batch, t, in_loss
            )
            carry = loop.problem.update(carry, grads, buffers, loop.hyper, loop.time(t))
            rows.add(loss, aux)
            if t + 1 in loop.save_at:
                states[t + 1] = carry
            loop.report("forward", t + 1, loop.batches.steps)
        states[len(rows)] = carry
        # The newest parameters stand for what the optimizer has captured.
        inputs = [
            *tree.tensors((state_of(loop.start), loop.hyper)),
            *in_loss.values(),
            *carry.params.values(),
        ]
        computed = loop.problem.computed_buffers
        for time, kept in states.items():
            if time:
                buffers = {
                    n: refuse_outputs(b, inputs, _LOSSES) if n in computed else b
                    for n, b in kept.buffers.items()
                }
                states[time] = refuse_inputs(kept, in_loss.values(), _IN_LOSS)._replace(
                    buffers=buffers
                )
        return Trajectory(states, *refuse_outputs(rows.stacked(), inputs, _LOSSES), len(rows))

    def forecast(self, measure: Measure) -> Forecast:
        """Predict the cost from steps that are differentiated with respect to params only."""
        # Asking for the gradient of a hyper-parameter inside the loss raises.
        cost = measure(self, frozenset({"params"}))
        return Forecast(cost.seconds.at(measure.steps), cost.bytes.at(measure.steps))


def _constant_gradient(
    problem: Problem,
    carry: Carry,
    hyper: HyperTree,
    batch: object,
    t: int,
    in_loss: dict[int, Tensor],
) -> tuple[dict[str, Tensor], Tensor, Any, dict[str, Tensor]]:
    """Compute `Problem.gradient` on constants.

    It notes in ``in_loss`` the tensors of ``hyper`` (and captured ones) that it depends on.
    """
    params, buffers, _ = tree.map_tensors(Tensor.detach, (carry.params, carry.buffers, None))
    batch, detached = tree.map_tensors(
        Tensor.detach, problem.with_targets(params, buffers, hyper, batch)
    )
    buffers = dict(detached)
    leaves = tree.leaves(hyper)
    places = [i for i, x in enumerate(leaves) if tree.differentiable(x)]

    def evaluate(
        params: dict[str, Tensor],
        values: list[Tensor],
        seen: dict[str, Tensor],
        read: list[Tensor],
    ) -> tuple[Tensor, Any]:
        filled = tree.with_leaves(hyper, tree.put(leaves, places, read))
        loss, (aux, new_buffers) = problem.evaluate(
            seen, buffers, filled, batch, second_order=False
        )
        ends = [loss, *tree.tensors(aux), *new_buffers.values()]
        stops = () if outside is None else (outside.anchor,)
        found = {id(x): x for x in check_graph(ends, (), second_order=False, stops=stops)}
        if not any(id(p) in found for p in params.values()):
            raise NotDifferentiableError(INDEPENDENT)
        given = {id(v): leaves[i] for i, v in zip(places, values, strict=True)}
        own = {id(p) for p in params.values()}
        # A leaf that is neither is captured by the loss; it acts through the inner gradients as
        # well.
        in_loss.update({id(x): given.get(key, x) for key, x in found.items() if key not in own})
        return loss, (loss, aux, new_buffers)

    constants = [leaves[i].detach() for i in places]
    outside = problem.outside
    try:
        if not may_call_autograd():
            (grads, _), (loss, aux, new_buffers) = tree.grad_with_aux(
                lambda both: evaluate(*both, *both)
            )((params, constants))
            check_constants(t, grads, loss, aux)
            return problem.for_the_rule(grads, params), loss, aux, new_buffers
        with torch.enable_grad(), refusing_recomputation():
            alias = {name: p.requires_grad_() for name, p in params.items()}
            if problem.first_since_init():
                alias = {name: p.clone().detach().requires_grad_() for name, p in alias.items()}
            values = [x.requires_grad_() for x in constants]
            seen, read = alias, values
            if outside is not None:
                seen = dict(zip(alias, outside.beside([*alias.values()]), strict=True))
                read = outside.beside(values)
            with refusing_writes(seen):
                loss, (_, aux, new_buffers) = evaluate(alias, values, seen, read)
        found = inner_gradient(
            loss,
            seen,
            create_graph=False,
            independent=lambda: NotDifferentiableError(INDEPENDENT),
        )
    except InnerLoopError:
        raise
    except RuntimeError as error:
        raise explain(error) from error
    grads = problem.for_the_rule(found, params)
    return (grads, *tree.map_tensors(Tensor.detach, (loss, aux, new_buffers)))


_IN_LOSS = (
    "FirstOrder() holds the inner gradients constant, and this tensor acts through them: the "
    "inner loss uses it, so its gradient "
    "would be lost. Write strategy=innerloop.Checkpointed() (or StoreAll, ForwardMode, "
    "Truncated), or detach the tensor"
)
_LOSSES = (
    "FirstOrder() differentiates the parameters along the loop; traj.losses, traj.aux and buffers "
    "are constants: evaluate the loss at "
    "traj.params, or write strategy=innerloop.Checkpointed()"
)
