"""The second derivative of the inner loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._inner_gradient.loss import INDEPENDENT
from innerloop._inner_gradient.torch_errors import explain
from innerloop._linear.operator import LinearOperator, Vector
from innerloop._linear.products import (
    SecondProduct,
    central_difference,
    forward_over_reverse,
    lacks_forward_mode,
    reverse_over_reverse,
    without_forward_mode,
)
from innerloop._problem import Problem
from innerloop._types import HyperTree
from innerloop._utils import torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import InnerLoopError, InvalidInputError, NotDifferentiableError

PRODUCTS = ("reverse", "mixed", "finite")


class Hessian(LinearOperator):
    r"""The second derivative of an inner loss by its parameters, a symmetric matrix.

    .. math:: \nabla^2_{\theta\theta}\, \ell(\theta, \lambda, b)

    In eager code all tensors count as constants: a product has no derivative of its own. Under
    ``torch.func`` it is a function like any other.

    Args:
        problem: whose loss is differentiated.
        carry: the parameters and buffers where it is. Random numbers are drawn from its random
            state, the same at every product; the user's own are left alone.
        hyper: the outer variables.
        batch: the data.
        product: how a product is taken: ``"reverse"`` (reverse over reverse), ``"mixed"`` (forward
            over reverse), or ``"finite"`` (a central difference of the gradient: approximate).
        finite_step: the relative step of ``product="finite"``.

    Example:
        The loss λ w₁ w₂² has the Hessian λ [[0, 2 w₂], [2 w₂, 2 w₁]], and the derivative of its
        gradient by λ is (w₂², 2 w₁ w₂).

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: hyper * params["w"][0] * params["w"][1] ** 2,
        ...     innerloop.optim.sgd(),
        ... )
        >>> carry = problem.init({"w": torch.tensor([3.0, 5.0])})
        >>> hessian = Hessian(problem, carry, torch.tensor(2.0), None)
        >>> hessian.as_matrix()
        tensor([[ 0., 20.],
                [20., 12.]])
        >>> hessian.mixed([torch.tensor([1.0, 10.0])])
        [tensor(325.)]
    """

    def __init__(
        self,
        problem: Problem,
        carry: Carry,
        hyper: HyperTree,
        batch: object,
        *,
        product: str = "reverse",
        finite_step: float | None = None,
    ) -> None:
        if product not in PRODUCTS:
            raise InvalidInputError(
                f"product={product!r}: choose one of {', '.join(map(repr, PRODUCTS))}"
            )
        self.problem = problem
        eager = mode() is Mode.EAGER
        self.carry = carry.detach() if eager else carry
        self.hyper = tree.map_tensors(Tensor.detach, hyper) if eager else hyper
        self.batch = batch
        self.product = product
        self.finite_step = finite_step
        self.takes = self.gives = list(self.carry.params.values())
        self._random_state = carry.random_state or RandomState.now()
        self._leaves = tree.leaves(self.hyper)
        self._learned = [i for i, x in enumerate(self._leaves) if tree.differentiable(x)]

    def __call__(self, vector: Vector) -> Vector:
        """Multiply the Hessian by ``vector``."""
        return list(self._second(vector, learned=[]).product[: len(self.takes)])

    @property
    def T(self) -> Hessian:  # noqa: N802
        """Return the operator itself: a Hessian is symmetric."""
        return self

    def mixed(self, vector: Vector) -> Vector:
        r"""Compute the derivative of the inner gradient by hyper, along ``vector``.

        Returns:
            :math:`\nabla_\lambda \langle \nabla_\theta \ell, v \rangle`, aligned with the leaves of
            hyper; None for those that are not floating-point tensors.
        """
        product = self._second(vector, learned=self._learned).product[len(self.takes) :]
        return tree.put([None] * len(self._leaves), self._learned, product)

    def _second(self, vector: Vector, learned: list[int]) -> SecondProduct:
        """Differentiate the gradient along ``vector``, by params and these leaves of hyper."""
        if len(vector) != len(self.takes):
            raise InvalidInputError(
                f"the vector has {len(vector)} entries, but there are {len(self.takes)} "
                "parameters: write a list with a tensor for each, in their order (None for zero)"
            )
        at = [*self.carry.params.values(), *[self._leaves[i] for i in learned]]
        along = [
            torch.zeros_like(p) if v is None else v
            for p, v in zip(self.carry.params.values(), vector, strict=True)
        ]
        eager = mode() is Mode.EAGER
        with at_random_state(self._random_state), torch.no_grad() if eager else nullcontext():
            try:
                found = self._taken(at, along, learned)
                return SecondProduct(*tree.map_tensors(Tensor.detach, found)) if eager else found
            except InnerLoopError:
                raise
            except RuntimeError as error:
                if self.product == "mixed" and lacks_forward_mode(error):
                    raise without_forward_mode(error) from error
                raise explain(error) from error

    def _taken(self, at: list[Tensor], along: list[Tensor], learned: list[int]) -> SecondProduct:
        count = len(along)

        def filled(values: list[Tensor]) -> tuple[dict[str, Tensor], Any]:
            params = dict(zip(self.carry.params, values[:count], strict=True))
            leaves = tree.put(self._leaves, learned, values[count:])
            return params, tree.with_leaves(self.hyper, leaves)

        def of_params(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            params, hyper = filled(values)
            grads, loss, _, _ = self.problem.gradient(params, self.carry.buffers, hyper, self.batch)
            return list(grads.values()), loss

        def evaluate(values: list[Tensor]) -> Tensor:
            params, hyper = filled(values)
            return self.problem.evaluate(params, self.carry.buffers, hyper, self.batch)[0]

        def tracked(values: list[Tensor]) -> tuple[Tensor, Tensor]:
            loss = evaluate(values)
            if mode() is Mode.TRANSFORMED and not torch_private.is_tracked(loss):
                raise NotDifferentiableError(INDEPENDENT)
            return loss, loss

        if self.product == "reverse":
            return reverse_over_reverse(of_params, at, along, before_each=self._rewind)
        # The derivative of the gradient by hyper, along a vector of parameters, is by symmetry
        # that of the gradient with respect to hyper: both gradients are pushed at once.
        gradients = tree.grad_with_aux(tracked)
        along = [*along, *[torch.zeros_like(x) for x in at[count:]]]
        if self.product == "mixed":
            return forward_over_reverse(gradients, at, along, before_each=self._rewind)
        return central_difference(
            gradients,
            at,
            along,
            before_each=self._rewind,
            value=lambda: evaluate(at),
            moved=count,
            relative_step=self.finite_step,
        )

    def _rewind(self) -> None:
        if self._random_state is not None:
            self._random_state.restore()
