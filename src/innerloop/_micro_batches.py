"""``micro_batches``: the loss of one step in parts, with the memory of one part."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from innerloop._inner_gradient import block
from innerloop._inner_gradient.graph import check_graph
from innerloop._inner_gradient.loss import check_loss
from innerloop._module.view import ModuleView
from innerloop._types import Named, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_function, check_takes, given, is_integer, is_number
from innerloop._utils.autocast import AutocastModes
from innerloop._utils.execution import Mode, may_read_values, mode
from innerloop._utils.fingerprint import Fingerprint
from innerloop._utils.inner_pass import inner_pass, is_inner_pass
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import CapturedTensorError, InvalidInputError
from innerloop.nn._mode import replacing

Part = Callable[[Params, Any, Any], Any]
"""``part(params, hyper, batch)``: what the loss returns for the rows of one part."""


class MicroBatches:
    """A loss that is evaluated in parts; see `micro_batches`."""

    def __init__(
        self,
        loss: Callable[..., Any],
        size: int,
        reduction: str,
        weight: Callable[[Any], Tensor | float] | None,
    ) -> None:
        self.loss, self.size, self.reduction, self.weight = loss, size, reduction, weight

    def __call__(self, params: Any, hyper: Any, batch: Any) -> Any:
        """Return what the loss returns for the whole batch."""
        return self.run(self.loss, params, hyper, batch, None)

    def __repr__(self) -> str:
        name = getattr(self.loss, "__name__", self.loss)
        return f"micro_batches({name}, {self.size}, reduction={self.reduction!r})"

    def run(
        self, part: Part, params: Params, hyper: object, batch: object, view: ModuleView | None
    ) -> Any:
        """Return what ``part`` returns for each part of the batch, put together.

        Args:
            part: evaluates the loss at the parameters that it is given.
            params: the parameters.
            hyper: the outer variables.
            batch: the whole batch.
            view: the module, whose modes hold again when a part is evaluated again.
        """
        pieces = self._pieces(batch)
        shares = self._shares(pieces)
        if not isinstance(params, dict) or mode() is not Mode.EAGER or not torch.is_grad_enabled():
            whole = _Whole([_flat(part(params, hyper, p.batch)) for p in pieces], pieces, shares)
            return whole.joined()
        call = _Call(part, params, hyper, pieces, shares, view)
        values = _Parts.apply(call, *call.inputs)
        return call.rebuilt(list(values))

    def _pieces(self, batch: object) -> list[_Piece]:
        """Cut the batch along its first dimension."""
        rows = {x.shape[0] for x in tree.tensors(batch) if x.ndim}
        if len(rows) != 1:
            what = f"tensors of {sorted(rows)} rows" if rows else "no tensor with rows"
            raise InvalidInputError(
                f"micro_batches cuts the batch of a step along its first dimension, and it holds "
                f"{what}: pass tensors [rows, ...] of one length; where the data need a gradient, "
                "put them in hyper and pass the indices of the rows, torch.arange(N)"
            )
        (count,) = rows
        if not count:
            raise InvalidInputError("the batch of a step has no rows: leave the step away")
        found = []
        for begin in range(0, count, self.size):
            here = slice(begin, min(begin + self.size, count))

            def cut(x: Tensor, here: slice = here) -> Tensor:
                return x[here] if x.ndim else x

            found.append(_Piece(tree.map_tensors(cut, batch), here))
        return found

    def _shares(self, pieces: list[_Piece]) -> list[Tensor | float]:
        """Return the factor of each part in the loss of the whole batch."""
        if self.reduction == "sum":
            return [1.0] * len(pieces)
        if self.weight is None:
            total = pieces[-1].rows.stop
            return [(p.rows.stop - p.rows.start) / total for p in pieces]
        weights = [torch.as_tensor(self.weight(p.batch)).detach().double() for p in pieces]
        if any(w.ndim for w in weights):
            raise InvalidInputError(
                f"weight(batch) returned a tensor of shape {tuple(weights[0].shape)}: write one "
                "number for the part, batch['mask'].sum()"
            )
        sum_ = torch.stack(weights).sum()
        if all(map(may_read_values, weights)):
            if not sum_ > 0:
                raise InvalidInputError(
                    f"the weights of the parts add up to {sum_.item()}: there is nothing to take "
                    "the mean of. Leave the step away"
                )
            # A part without any token has a mean of nothing, which is NaN.
            kept = [i for i, w in enumerate(weights) if w != 0]
            pieces[:], weights = [pieces[i] for i in kept], [weights[i] for i in kept]
        return [w / sum_ for w in weights]


def micro_batches(
    loss: Callable[..., Any],
    size: int,
    *,
    reduction: str = "mean",
    weight: Callable[[Any], Tensor | float] | None = None,
) -> MicroBatches:
    r"""Return ``loss`` evaluated on a few rows of its batch at a time: gradient accumulation.

    A step on a large batch then needs the memory of one part of it, in the inner gradient and in
    its own derivative alike, and is the same step. With parts :math:`b_1, \dots, b_k` of
    :math:`n_i` rows,

    .. math::
        \ell(\theta, b) = \sum_i c_i\, \ell(\theta, b_i), \qquad
        c_i = \frac{n_i}{\sum_j n_j}, \quad 1, \quad\text{or}\quad \frac{w(b_i)}{\sum_j w(b_j)} .

    Args:
        loss: ``loss(params, hyper, batch)`` or, for `Problem.from_module`, ``loss(model, hyper,
            batch)``; a scalar, or a pair ``(scalar, aux)``.
        size: rows in a part; the last one may have fewer. The batch of a step holds tensors ``[N,
            ...]``, which are cut; numbers and 0-dim tensors go to every part. Where the data need a
            gradient they are in ``hyper``, and the batch are the indices of the rows.
        reduction: ``"mean"`` if the loss is a mean over rows, ``"sum"`` if it is a sum.
        weight: ``weight(batch)``, a number for each part, where the loss is a mean over something
            else than rows, ``lambda batch: batch["mask"].sum()`` for a mean over the tokens that
            are no padding. Parts of weight 0 are left out.

    Returns:
        A loss for `Problem`. What it returns as ``aux`` is put together as well: 0-dim tensors and
        numbers as the loss is, tensors with rows one behind the other.

    Raises:
        InvalidInputError: the loss normalises over the batch (``BatchNorm`` in training) or writes
            a buffer, so that its parts are not parts of the whole.
        CapturedTensorError: the loss uses a tensor that requires grad and is in neither ``params``
            nor ``hyper``.

    **Cost**: each part is evaluated, and differentiated, once in the forward pass; once more, with
    its second derivative, in the outer backward pass. Random numbers are drawn part by part, and
    are the same in both. Under ``torch.func`` transforms and in compiled code (``product="mixed"``,
    `ForwardMode`, ``vmap`` over tasks) the result is the same, but nothing is saved.

    Example:
        The mean of (w - b)²/2 over the rows 0, 2, 4 has the gradient w - 2. From 8, half of it is
        taken away: 5, and d 5/d 8 = 1/2.

        >>> import torch, innerloop
        >>> loss = innerloop.micro_batches(
        ...     lambda params, hyper, batch: ((params["w"] - batch) ** 2).mean() / 2, 2
        ... )
        >>> problem = innerloop.Problem(loss, innerloop.optim.sgd(lr=0.5))
        >>> w = torch.tensor(8.0, requires_grad=True)
        >>> traj = innerloop.unroll(problem, {"w": w}, [torch.tensor([0.0, 2.0, 4.0])])
        >>> traj.params["w"].item(), torch.autograd.grad(traj.params["w"], w)
        (5.0, (tensor(0.5000),))
    """
    check_function("loss", loss, "write a function loss(params, hyper, batch)")
    check_takes("loss", loss, "params", "hyper", "batch")
    if not is_integer(size) or size < 1:
        raise InvalidInputError(f"{given('size', size)}: write a number of rows, 1 or more")
    if reduction not in ("mean", "sum"):
        raise InvalidInputError(f'{given("reduction", reduction)}: write "mean" or "sum"')
    if weight is not None:
        check_function("weight", weight, "write a function weight(batch) that returns a number")
        check_takes("weight", weight, "batch")
        if reduction == "sum":
            raise InvalidInputError(
                'weight= says what a mean is taken over, and reduction="sum" takes none: write '
                "one of them"
            )
    return MicroBatches(loss, size, reduction, weight)


class _Piece(NamedTuple):
    """The data of one part, and which rows of the batch they are."""

    batch: Any
    rows: slice


class _Flat(NamedTuple):
    """What the loss returned for a part: the scalar and the tensors of aux, and the rest of it."""

    tensors: list[Tensor]
    template: Any


def _flat(result: Any) -> _Flat:
    loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    loss = check_loss(loss, "what the loss of micro_batches returns (alone, or first of a pair)")
    found = tree.map_leaves(
        lambda x: loss.new_tensor(x) if is_number(x) and not isinstance(x, Tensor) else x, aux
    )
    tensors, template = tree.split((loss, found))
    return _Flat(tensors, (template, isinstance(result, tuple) and len(result) == 2))


class _Whole(NamedTuple):
    """The results of all parts."""

    parts: list[_Flat]
    pieces: list[_Piece]
    shares: list[Tensor | float]

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the whole batch."""
        columns = zip(*(part.tensors for part in self.parts), strict=True)
        return [self._joined(list(column)) for column in columns]

    def _joined(self, column: list[Tensor]) -> Tensor:
        if column[0].ndim:
            return torch.cat(column)
        first, *more = (_times(x, c) for x, c in zip(column, self.shares, strict=True))
        for x in more:
            first = first + x
        return first

    def joined(self) -> Any:
        """Return what the loss returns for the whole batch."""
        return _rebuilt(self.parts[0].template, self.tensors())


def _rebuilt(template: Any, tensors: Sequence[Tensor]) -> Any:
    tree_, is_pair = template
    loss, aux = tree.join(tree_, list(tensors))
    return (loss, aux) if is_pair else loss


def _times(x: Tensor, share: Tensor | float) -> Tensor:
    return x * (share.to(x.dtype) if isinstance(share, Tensor) and x.is_floating_point() else share)


class _Call:
    """One evaluation of the loss in parts, which can be repeated part by part.

    Attributes:
        inputs: the parameters, then the tensors of hyper that may have a derivative.
        kept: the gradient with respect to the parameters, once the forward pass has taken it.
    """

    def __init__(
        self,
        part: Part,
        params: Params,
        hyper: object,
        pieces: list[_Piece],
        shares: list[Tensor | float],
        view: ModuleView | None,
    ) -> None:
        self._part, self._pieces, self._shares, self._view = part, pieces, shares, view
        self._names = list(params)
        self._all, self._template = tree.split(hyper)
        self._places = [i for i, x in enumerate(self._all) if tree.differentiable(x)]
        self.inputs = [*params.values(), *(self._all[i] for i in self._places)]
        self._all = [x.detach() for x in self._all]
        self.kept: list[Tensor | None] | None = None
        self._training = None if view is None else view.training
        self._autocast = AutocastModes.now(self.inputs)
        self._random_state = RandomState.now()
        self._readable = block.readable()
        self._marks: list[Fingerprint] = []
        self._result: Any = None
        self._rows: list[bool] = []

    @property
    def count(self) -> int:
        """Return the number of parameters."""
        return len(self._names)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Restore the modes and the random numbers of the forward pass."""
        with ExitStack() as stack:
            stack.enter_context(at_random_state(self._random_state))
            if self._view is not None and self._training is not None:
                stack.enter_context(self._view.in_modes(self._training))
            stack.enter_context(self._autocast.restored())
            yield

    def _evaluated(self, piece: _Piece, tensors: Sequence[Tensor]) -> _Flat:
        """Evaluate one part at these inputs, with a graph."""
        params = dict(zip(self._names, tensors, strict=False))
        hyper = tree.join(self._template, tree.put(self._all, self._places, tensors[self.count :]))
        blocks = nullcontext() if self._readable is None else block.reading(None, self._readable)
        with torch.enable_grad(), replacing(), blocks:
            return _flat(self._part(params, hyper, piece.batch))

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate and differentiate each part, and keep the sum of the gradients."""
        params = [x.detach().requires_grad_() for x in tensors[: self.count]]
        constants = [x.detach() for x in tensors[self.count :]]
        total: list[Tensor | None] = [None] * self.count
        ends: list[_Flat] = []
        for piece, share in zip(self._pieces, self._shares, strict=True):
            found = self._evaluated(piece, [*params, *constants])
            own = {id(p) for p in params}
            leaves = [
                weakref.ref(leaf)
                for leaf in check_graph(found.tensors, params, second_order=False)
                if id(leaf) not in own
            ]
            loss = found.tensors[0]
            if loss.requires_grad:
                with inner_pass():
                    grads = torch.autograd.grad(
                        loss, params, _times(torch.ones_like(loss), share), allow_unused=True
                    )
                total = _sum(total, grads)
            ends.append(found._replace(tensors=[x.detach() for x in found.tensors]))
            self._marks.append(Fingerprint.of(ends[-1].tensors))
            del found, loss
            if any(leaf() is not None for leaf in leaves):
                raise CapturedTensorError(
                    "the loss of micro_batches uses a tensor that requires grad and is neither in "
                    "params nor in hyper, so it would silently get no gradient: hand it in through "
                    "hyper (a module: its parameters by name), or detach it"
                )
        self.kept = total
        whole = _Whole(ends, self._pieces, self._shares)
        self._result = ends[0].template
        self._rows = [bool(x.ndim) for x in ends[0].tensors]
        return whole.tensors()

    def rebuilt(self, values: list[Tensor]) -> Any:
        """Return what the loss returns, made of the tensors of the whole batch."""
        return _rebuilt(self._result, values)

    def _cotangents(self, given: Sequence[Tensor | None], i: int) -> list[Tensor | None]:
        """Return the cotangents of what part i returned."""
        piece, share = self._pieces[i], self._shares[i]
        begin = sum(p.rows.stop - p.rows.start for p in self._pieces[:i])
        rows = slice(begin, begin + piece.rows.stop - piece.rows.start)
        return [
            None if g is None else g[rows] if in_rows else _times(g, share)
            for g, in_rows in zip(given, self._rows, strict=True)
        ]

    def _pulled(
        self,
        i: int,
        inputs: list[Tensor],
        given: Sequence[Tensor | None],
        wanted: Sequence[bool],
        *,
        create_graph: bool,
    ) -> list[Tensor | None]:
        """Pull cotangents through part i, to the inputs that are wanted."""
        hooks = torch_private.hooks_so_far()
        ends = self._evaluated(self._pieces[i], inputs).tensors
        if not Fingerprint.of(ends).agrees(self._marks[i]):
            raise _differs("gave other numbers")
        if not is_inner_pass() and torch_private.hooks_so_far() != hooks and ends[0].requires_grad:
            # A hook acts in the inner gradient alone; what runs here is the outer one.
            with inner_pass():
                params = inputs[: self.count]
                torch.autograd.grad(ends[0], params, retain_graph=True, allow_unused=True)
        if create_graph:
            check_graph(ends, inputs[: self.count], second_order=True)
        pairs = [
            (x, g)
            for x, g in zip(ends, self._cotangents(given, i), strict=True)
            if g is not None and x.requires_grad
        ]
        chosen = [x for x, w in zip(inputs, wanted, strict=True) if w]
        found: list[Tensor | None] = [None] * len(inputs)
        if not pairs or not chosen:
            return found
        outputs, cotangents = zip(*pairs, strict=True)
        grads = torch.autograd.grad(
            outputs, chosen, cotangents, create_graph=create_graph, allow_unused=True
        )
        places = [k for k, w in enumerate(wanted) if w]
        return tree.put(found, places, list(grads))

    def gradient(
        self, tensors: Sequence[Tensor], given: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradient, part by part; that of the loss itself is there already."""
        kept, self.kept = self.kept, None
        only_loss = given[0] is not None and all(g is None for g in given[1:])
        if kept is not None and only_loss and not any(wanted[self.count :]):
            factor: Any = given[0]
            grads = [
                None if g is None or not w else g * factor
                for g, w in zip(kept, wanted[: self.count], strict=True)
            ]
            return [*grads, *[None] * (len(wanted) - self.count)]
        total: list[Tensor | None] = [None] * len(tensors)
        inner = inner_pass() if is_inner_pass() else ExitStack()
        with self._as_before(), inner:
            for i in range(len(self._pieces)):
                inputs = [x.detach().requires_grad_() for x in tensors]
                total = _sum(total, self._pulled(i, inputs, given, wanted, create_graph=False))
        return total

    def second(
        self,
        tensors: Sequence[Tensor],
        given: Sequence[Tensor | None],
        wanted: Sequence[bool],
        along: Sequence[Tensor | None],
        mark: Fingerprint,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Pull cotangents ``along`` through `gradient`: to the inputs, and to ``given``.

        Where this is to be differentiated once more, all parts keep their graph.

        Args:
            mark: that of what `gradient` returned, which is found here again.
        """
        first: list[Tensor | None] = [None] * len(tensors)
        again = torch.is_grad_enabled()
        places = [k for k, g in enumerate(given) if g is not None]
        total: list[Tensor | None] = [None] * (len(tensors) + len(places))
        with self._as_before(), torch.enable_grad():
            for i in range(len(self._pieces)):
                inputs = [_variable(x, again) for x in tensors]
                weights = tree.put(
                    list(given), places, [_variable(given[k], again) for k in places]
                )
                with inner_pass():
                    grads = self._pulled(i, inputs, weights, wanted, create_graph=True)
                first = _sum(first, [None if g is None else g.detach() for g in grads])
                pairs = [
                    (g, v)
                    for g, v in zip(grads, along, strict=True)
                    if g is not None and v is not None and g.requires_grad
                ]
                if not pairs:
                    continue
                outputs, cotangents = zip(*pairs, strict=True)
                found = torch.autograd.grad(
                    outputs,
                    [*inputs, *(weights[k] for k in places)],
                    cotangents,
                    create_graph=again,
                    allow_unused=True,
                )
                total = _sum(total, found)
        if not _mark(first).agrees(mark):
            raise _differs("has another gradient")
        of_given = tree.put([None] * len(given), places, total[len(tensors) :])
        return total[: len(tensors)], of_given


def _mark(grads: Sequence[Tensor | None]) -> Fingerprint:
    return Fingerprint.of([g for g in grads if g is not None])


def _differs(what: str) -> InvalidInputError:
    return InvalidInputError(
        f"a part of the loss of micro_batches ran again in a backward pass and {what} than in the "
        "forward pass: the derivative would be another one. What it reads has changed in between "
        "(the batch or another tensor written in place, an attribute), or it draws random numbers "
        "of another generator than torch's own: hand tensors in through the batch or hyper, and "
        "do not write them before the backward pass"
    )


def _variable(x: Any, attached: bool) -> Tensor:
    """Return an alias of ``x`` to differentiate by; a constant unless it stays attached."""
    if attached and x.requires_grad:
        alias: Tensor = torch.ops.aten.alias.default(x)
        return alias
    variable: Tensor = x.detach().requires_grad_()
    return variable


def _sum(total: list[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the sums of gradients, dense; None is zero."""
    dense = [g.to_dense() if g is not None and g.layout != torch.strided else g for g in more]
    return [
        b if a is None else a if b is None else a + b for a, b in zip(total, dense, strict=True)
    ]


class _Parts(torch.autograd.Function):
    """The loss as a node that saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        found = call.forward(tensors)
        ctx.mark_non_differentiable(*[x for x in found if not tree.differentiable(x)])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        # The inner gradient asks for the parameters only, and hyper would cost a second evaluation.
        wanted = [
            needed and torch_private.is_asked_for(node)
            for needed, (node, _) in zip(ctx.needs_input_grad[1:], ctx.next_functions, strict=True)
        ]
        request = _Request(ctx.call, wanted, [g is not None for g in given])
        if not any(request.given):
            return (None,) * (1 + len(wanted))
        tensors = ctx.saved_tensors
        found = _PartsGradient.apply(request, *tensors, *[g for g in given if g is not None])
        return (None, *request.spread(found))


class _Request:
    """One pullback of a node: which cotangents there are, which are wanted, which are not zero."""

    def __init__(self, call: _Call, wanted: list[bool], given: list[bool]) -> None:
        self.call, self.wanted, self.given = call, wanted, given
        self.reached: list[int] = []
        self.mark: Fingerprint | None = None

    def cotangents(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the cotangents, None for each that is zero."""
        rest = iter(tensors)
        return [next(rest) if there else None for there in self.given]

    def spread(self, found: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of all inputs."""
        return tree.put([None] * len(self.wanted), self.reached, list(found))


class _PartsGradient(torch.autograd.Function):
    """The gradient of `_Parts` as a node, which saves no more than that one."""

    @staticmethod
    def forward(ctx: Any, request: _Request, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.request = request
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        count = len(request.wanted)
        found = request.call.gradient(
            tensors[:count], request.cotangents(tensors[count:]), request.wanted
        )
        request.reached = [i for i, g in enumerate(found) if g is not None and request.wanted[i]]
        kept = tuple(g for i, g in enumerate(found) if i in request.reached and g is not None)
        request.mark = _mark(kept)
        return kept

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        request, tensors = ctx.request, ctx.saved_tensors
        count = len(request.wanted)
        assert request.mark is not None
        of_inputs, of_given = request.call.second(
            tensors[:count],
            request.cotangents(tensors[count:]),
            request.wanted,
            request.spread(along),
            request.mark,
        )
        kept = [g for g, there in zip(of_given, request.given, strict=True) if there]
        return (None, *of_inputs, *kept)


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_parts(view: ModuleView) -> None:
    """Raise if a norm of the module mixes the rows of a batch."""
    for module, training in zip(view.modules, view.training, strict=True):
        if isinstance(module, _NORMS) and (training or not module.track_running_stats):
            raise InvalidInputError(
                f"{type(module).__name__} normalises over the rows of a batch, so the loss of a "
                "batch is not that of its parts: call eval() on it, use GroupNorm or LayerNorm, or "
                "leave micro_batches away"
            )


def check_written(before: Named, after: Named) -> None:
    """Raise if one of a module's buffers was written, or replaced by another tensor.

    Args:
        before: copies of the buffers, made for this evaluation.
        after: what stands in their places now.
    """
    for name, buffer in before.items():
        if after[name] is not buffer or torch_private.version(torch_private.innermost(buffer)):
            raise InvalidInputError(
                f"the loss writes the buffer {name!r}, once for each part where the whole batch "
                "writes it once: call eval() on that module, or leave micro_batches away"
            )
