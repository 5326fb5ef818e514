"""Update rules that treat every element alike: small parameters side by side in one flat tensor."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from innerloop._types import Grads, Params, Scalar
from innerloop._utils.execution import may_call_autograd
from innerloop.errors import InvalidInputError
from innerloop.optim._base import Rule
from innerloop.optim._engine.fused import Kernel, step
from innerloop.optim._engine.grads import by_step_count, which_have_gradient
from innerloop.optim._engine.packing import (
    FLAT_LIMIT,
    Layout,
    Packed,
    is_whole,
    layout_of,
    zeros,
)
from innerloop.optim._engine.update import (
    advance,
    in_bucket,
    in_lists,
    one_by_one,
    repack,
    scalar_field,
    without_state,
)
from innerloop.optim._settings import check_state


class Elementwise(Rule):
    """A rule that treats every element alike; its one method, `step`, is for *one* tensor.

    This class adds the names, flat packing of small tensors, hyper-parameters given as tensors or
    per parameter, skipped gradients and step counts.
    """

    scalars: ClassVar[tuple[str, ...]] = ()
    """State fields that hold one number per parameter (1 at the start), not a tensor of its shape.

    They are numbers as long as the hyper-parameters are, 0-dim tensors when those are tensors, and
    of the parameter's shape when those have it."""

    flat_limit: ClassVar[int] = FLAT_LIMIT
    """Elements; a larger parameter is updated alone and never copied."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # What stands for the ``step`` of a parent knows nothing of a ``step`` that comes before it.
        for name in ("update_ignores_param", "kernel", "step_lists"):
            first = next(c for c in cls.__mro__ if "step" in vars(c) or name in vars(c))
            if name not in vars(first):
                setattr(cls, name, getattr(Elementwise, name))

    def packs_small_params(self, hyper: Mapping[str, Any]) -> bool:
        """True if small parameters are updated as one flat tensor.

        Below about four operations per tensor that costs more than it saves.
        """
        return True

    def update_ignores_param(self, hyper: Mapping[str, Any]) -> bool:
        """True if the update does not depend on the parameter's value, bit for bit.

        That is, ``step(grad, param) == param + step(grad, 0)``. Only gradients are then packed.
        """
        return False

    @abc.abstractmethod
    def step(
        self, grad: Tensor, param: Tensor, state: Any, hyper: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute ``(new_param, new_state)`` of one tensor.

        Args:
            grad: the gradient, of the shape of ``param``; real.
            param: the parameter; may be several parameters side by side, so every operation must be
                elementwise.
            state: ``state_type`` with tensors of the shape of ``param`` (or None) and ``count``,
                the number of the step being taken (1 at the first one), an int or a tensor.
            hyper: each of ``hyper_names``: a number, a 0-dim tensor, or a tensor of the shape of
                ``param``.
        """

    def step_lists(
        self, grads: list[Tensor], params: list[Tensor], state: Any, hyper: Mapping[str, float]
    ) -> tuple[list[Tensor], Any] | None:
        """Step several tensors in fewer calls (optional, for speed).

        The fields of ``state`` are lists here. None means that the tensors must be stepped one by
        one.
        """
        return None

    def kernel(self, count: Scalar, hyper: Mapping[str, Any]) -> Kernel | None:
        """Return the step of a bucket as one operation with a pullback (optional, for speed).

        Args:
            count: the number of the step being taken.
            hyper: each of ``hyper_names``, numbers all.
        """
        return None

    def init(self, params: Params) -> Any:
        resolved = self.resolve(None)
        used = self.fields(resolved)
        layout = self._layout(params, resolved) if used else ()
        return self.state_type(
            0,
            *(self._start(name, layout, params) if name in used else None for name in self.slots()),
        )

    def _start(self, slot: str, layout: Layout, params: Params) -> Packed:
        return Packed(
            layout,
            tuple(1.0 if slot in self.scalars else zeros(bucket, params) for bucket in layout),
        )

    def update(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        check_state(self, state, self.state_type)
        resolved = self.resolve(hyper)
        if (found := self._at_once(grads, state, params, resolved)) is not None:
            return found
        active = which_have_gradient(grads, params)
        lists = self._takes_lists(resolved)
        if (
            active is None
            and params
            and isinstance(state.count, (int, Tensor))  # a tensor in compiled code
            and not self.fields(resolved)
            and (lists or not self.packs_small_params(resolved))
        ):
            way = without_state if lists else one_by_one
            done = way(self, grads, state, params, resolved)
            if done is not None:
                return done
        ages, counts = by_step_count(state.count, params)
        layout = self._layout(params, resolved, active, ages)
        old = {
            n: self._laid_out(n, held, layout, params)
            for n, held in zip(self.slots(), state[1:], strict=True)
        }
        new: dict[str, list[Any]] = {name: [] for name in old}
        new_params = dict(params)
        together = in_lists(self, layout, grads, params, counts, old, resolved) if lists else {}
        for i, bucket in enumerate(layout):
            fields = {
                name: None if packed is None else packed.flats[i] for name, packed in old.items()
            }
            if i in together:
                stepped, fields = together[i]
                new_params |= stepped
            elif bucket.active:
                stepped, fields = in_bucket(
                    self, bucket, grads, params, counts[bucket.age], fields, resolved
                )
                new_params |= stepped
            for name, tensor in fields.items():
                new[name].append(tensor)
        slots = (repack(layout, flats, params) for flats in new.values())
        return new_params, self.state_type(advance(state.count, layout, active), *slots)

    def _at_once(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Any] | None:
        """Step all parameters as one operation, where the state has them side by side already.

        What the other ways look up for each parameter at each step takes as long as a fifth of the
        step of a small network.

        Returns:
            None where there is anything to look up.
        """
        slots = state[1:]
        first = slots[0] if slots else None
        if type(self).kernel is Elementwise.kernel or self.scalars or type(first) is not Packed:
            return None
        layout = first.layout
        if (
            len(layout) != 1
            or not may_call_autograd()
            or any(x is not None and getattr(x, "layout", None) is not layout for x in slots)
            or not is_whole(layout[0], first.flats[0], params, grads, self._limit(hyper))
        ):
            return None
        fields = {
            name: None if packed is None else packed.flats[0]
            for name, packed in zip(self.slots(), slots, strict=True)
        }
        found = step(self, layout[0], grads, params, state.count, fields, hyper)
        if found is None:
            return None
        new = (None if flat is None else Packed(layout, (flat,)) for flat in found[1].values())
        return found[0], self.state_type(state.count + 1, *new)

    def _layout(
        self,
        params: Params,
        hyper: Mapping[str, Any],
        active: Mapping[str, bool] | None = None,
        ages: Mapping[str, int] | None = None,
    ) -> Layout:
        return layout_of(params, active, ages, self._limit(hyper))

    def _limit(self, hyper: Mapping[str, Any]) -> int:
        """Return how large a parameter may be to lie beside others."""
        return self.flat_limit if self.packs_small_params(hyper) else 0

    def _takes_lists(self, hyper: Mapping[str, Any]) -> bool:
        """True if the rule has `step_lists`, and nothing looks closer than autograd does."""
        own = type(self).step_lists is not Elementwise.step_lists
        return (
            own
            and may_call_autograd()
            and all(isinstance(value, (int, float)) for value in hyper.values())
        )

    def restored(self, slot: str, named: Mapping[str, Any], params: Params) -> Packed:
        layout = layout_of(params, None, None)
        if slot in self.scalars:
            return scalar_field(
                layout, {n: 1.0 if v is None else float(v) for n, v in named.items()}, params
            )
        return Packed.of(
            layout,
            {
                n: torch.zeros_like(params[n]) if v is None else v.detach().clone()
                for n, v in named.items()
            },
        )

    def _laid_out(
        self, slot: str, held: Mapping[str, Any] | None, layout: Layout, params: Params
    ) -> Packed | None:
        """Lay out a state field in the buckets of ``layout``."""
        if held is None:
            return None
        try:
            return (
                scalar_field(layout, held, params)
                if slot in self.scalars
                else Packed.of(layout, held)
            )
        except KeyError as error:
            raise InvalidInputError(
                f"the state knows no parameter {error}: it belongs to other parameters; pass what "
                "init(params) or the last update returned"
            ) from None
