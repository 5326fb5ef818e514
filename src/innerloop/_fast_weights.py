"""``nn.FastWeights``: a layer that trains weights of its own for each sample, as it reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from innerloop._inner_gradient import block
from innerloop._inner_gradient.gradient import check_graph, finish, inner_gradient
from innerloop._inner_gradient.loss import check_loss
from innerloop._inner_gradient.torch_errors import explain, writes_without_rows
from innerloop._module.checks import (
    check_module,
    check_not_inference,
    refusing_recomputation,
    refusing_writes,
)
from innerloop._module.view import ModuleView
from innerloop._problem import Problem, hyper_names
from innerloop._types import Grads, Named, Params
from innerloop._unroll import check_strategy, unroll
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_has_values, check_takes, given, is_integer, shown
from innerloop._utils.execution import Mode, mode
from innerloop._utils.finite import is_finite
from innerloop._utils.random_state import RandomState, at_random_state
from innerloop.errors import (
    InnerLoopError,
    InvalidInputError,
    NonFiniteError,
    NotDifferentiableError,
)
from innerloop.nn._mode import replacing
from innerloop.optim._base import Optimizer, refuse_class
from innerloop.optim._engine.elementwise import Elementwise
from innerloop.optim._engine.precision import warn_of_half
from innerloop.strategy._base import Strategy

_FAST = "module."
"""How the names of the parameters of the inner module begin, in a view of all the modules."""

GROUP = 8
"""Chunks of a sequence that are one tensor for a strategy which replays steps."""


class FastWeights(nn.Module):
    r"""A layer whose weights are trained on each sample anew, inside ``forward``.

    A sample is a sequence, which is cut into chunks. Each chunk is one step of training of a small
    module, whose parameters start from the learned ones and are different for each sample. With
    weights :math:`W`, inner loss :math:`\ell`, update rule :math:`u` and chunks :math:`x_1, \dots,
    x_n`,

    .. math::
        W_c = u(\nabla_W\, \ell(W_{c-1}, d_c), W_{c-1}), \qquad
        y_c = f(W_{c-1}, x_c) \quad \text{or} \quad y_c = f(W_c, x_c).

    Everything that comes from outside of this recursion gets the exact gradient through all steps,
    by ordinary training of the network that the layer is part of: the start :math:`W_0` (the
    parameters of ``module``), the inputs, the parameters of ``loss`` and ``output``, and the
    hyper-parameters of the optimizer that are given in ``hyper``.

    The samples run together, so the code of ``module``, ``loss`` and ``output`` is written for one
    sample and runs under ``torch.func.vmap``.

    Args:
        module: the module that is trained inside. Its parameters that require grad now are the fast
            ones, and remain so where they are frozen later; the others are constants.
        loss: ``loss(module, data) -> scalar``, the inner loss on one chunk of one sample, whose
            tensors are ``[chunk, ...]``. An ``nn.Module`` with that ``forward`` is made part of the
            layer: its parameters (projections to keys and values) are trained from outside.
        optimizer: the inner update rule, from `innerloop.optim`; it keeps a state for each sample.
        chunk: tokens per inner step. The last chunk of a sequence may be shorter.
        strategy: how the loop is differentiated. None (or `StoreAll`) keeps the graph of every
            chunk; `Checkpointed` bounds the memory, ``Checkpointed(slots=4)`` for example.
        output: ``output(module, x) -> [chunk, ...]``, what the layer returns for one chunk of one
            sample; default ``module(x)``. As with ``loss``, it may be an ``nn.Module``.
        read: ``"before"``: a chunk is answered by the weights of the chunks before it, so no token
            sees a later one; ``"after"``: by the weights that have seen the chunk, whose tokens
            then see each other.
        hyper: hyper-parameters of the optimizer to be learned: a dict of ``nn.Parameter`` by name,
            ``{"lr": nn.Parameter(torch.tensor(0.1))}``, or an ``nn.Module`` that is called without
            arguments and returns such a dict (of a rate that has to stay positive, say).

    Raises:
        InvalidInputError: an argument has the wrong kind, or ``module`` writes its buffers.
        NonFiniteError: an inner loss or a fast weight is NaN or infinite.
        NotDifferentiableError: an operation of the inner loss lacks a second derivative.

    **Cost** for n chunks, with G one inner gradient of all samples and A what it saves: about 3 n G
    and n (2.23 A + P), P the weights of all samples; with `Checkpointed` as there.

    In "Learning to (learn at test time): RNNs with expressive hidden states" (Sun et al. 2024) a
    token is answered by the gradients of its chunk up to itself, all taken at :math:`W_{c-1}` (the
    dual form); here a chunk is answered as a whole.

    Note:
        The layer adapts in evaluation too, under ``torch.no_grad()``; ``torch.inference_mode()`` is
        refused. Inside ``torch.compile`` it runs uncompiled, and breaks the graph. Activation
        checkpointing within ``module``, ``loss`` or ``output`` is right and saves nothing: write
        ``strategy=innerloop.Checkpointed()``, or checkpoint the layer as a whole.

    Example:
        One weight w, one step on the loss (k w - v)²/2 for each of two tokens. From w = 0 with rate
        0.5, the token k = 1, v = 4 gives w = 2, by which the second one is answered: 1 · 2.

        >>> import torch, innerloop
        >>> layer = innerloop.nn.FastWeights(
        ...     torch.nn.Linear(1, 1, bias=False),
        ...     lambda module, data: (module(data["k"]) - data["v"]).square().sum() / 2,
        ...     innerloop.optim.sgd(lr=0.5),
        ...     chunk=1,
        ... )
        >>> _ = torch.nn.init.zeros_(layer.module.weight)
        >>> k, v = torch.ones(1, 2, 1), torch.tensor([[[4.0], [0.0]]])
        >>> layer(k, {"k": k, "v": v}).flatten().tolist()
        [0.0, 2.0]
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor],
        optimizer: Optimizer,
        chunk: int,
        strategy: Strategy | None = None,
        *,
        output: Callable[..., Tensor] | None = None,
        read: str = "before",
        hyper: Mapping[str, nn.Parameter] | nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_module(module)
        _check_function("loss", loss, "data")
        if output is not None:
            _check_function("output", output, "x")
        _check_optimizer(optimizer)
        if not is_integer(chunk) or chunk < 1:
            raise InvalidInputError(f"{given('chunk', chunk)}: write a number of tokens, 1 or more")
        if strategy is not None:
            check_strategy(strategy)
            if getattr(strategy, "compile", False):
                raise InvalidInputError(
                    f"strategy={strategy!r}: a layer runs uncompiled, for its problem is another "
                    "one in every call. Write compile=False"
                )
        if read not in ("before", "after"):
            raise InvalidInputError(f'{given("read", read)}: write "before" or "after"')
        self.module, self.loss, self.output = module, loss, output
        self.optimizer, self.chunk, self.strategy, self.read = optimizer, chunk, strategy, read
        self.hyper = _as_module(hyper, optimizer)
        self.fast = tuple(
            name.removeprefix(_FAST)
            for name, p in ModuleView({"module": module}).source.items()
            if p.requires_grad
        )
        """The names of the parameters of ``module`` that are trained inside."""
        if not self.fast:
            raise InvalidInputError(
                "no parameter of module requires grad, so there is nothing to train inside: call "
                "requires_grad_() on those that are fast weights"
            )

    @torch_private.never_compiled
    def forward(self, x: Tensor, data: object = None) -> Tensor:
        """Return the outputs of all chunks, ``[B, T, ...]``.

        Args:
            x: ``[B, T, ...]``, B samples of T tokens, what ``output`` gets.
            data: what ``loss`` gets: tensors ``[B, T, ...]``, one or any pytree of them; default
                ``x``.
        """
        if torch.is_inference_mode_enabled():
            raise InvalidInputError(
                "torch.inference_mode is on, in which no gradient can be taken, not even an inner "
                "one: write torch.no_grad instead"
            )
        loop = _Loop(self, x, data)
        plain = self.strategy is None or self.strategy.keeps_graph
        try:
            return loop.plain() if plain and mode() is Mode.EAGER else loop.unrolled(self.strategy)
        except InnerLoopError:
            raise
        except RuntimeError as error:
            raise _explained(error) from error

    def extra_repr(self) -> str:
        """Return what ``repr`` shows besides the modules."""
        shown_too = f", strategy={self.strategy!r}" if self.strategy is not None else ""
        return f"optimizer={self.optimizer!r}, chunk={self.chunk}, read={self.read!r}{shown_too}"


class _Learned(nn.Module):
    """Hyper-parameters of the optimizer, each a parameter of its own."""

    def __init__(self, values: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, value)

    def forward(self) -> dict[str, Tensor]:
        return dict(self.named_parameters(recurse=False))


class _Loop:
    """One call of the layer: the chunks of all samples, and the modules as they are now.

    The steps run on stacked weights, a row for each sample. The sum of the samples' losses has the
    gradients of the single ones, so only the user's code runs under ``vmap``: what autograd sees is
    what one would have batched by hand.
    """

    def __init__(self, layer: FastWeights, x: Tensor, data: object) -> None:
        self.leaves, self.template = tree.split(x if data is None else data)
        _check_sequences(x, self.leaves)
        size, self.after = layer.chunk, layer.read == "after"
        self.whole, self.size, self.own_data = x, size, data is not None
        self.x = x.split(size, dim=1)
        self.data = list(zip(*(leaf.split(size, dim=1) for leaf in self.leaves), strict=True))
        # The last chunk trains nothing that would be read, unless it is read afterwards.
        self.steps = len(self.x) - (not self.after)
        self.loss, self.output = layer.loss, layer.output
        modules = {
            "module": layer.module,
            "loss": self.loss,
            "output": self.output,
        }
        # Made anew for every call: the user may have changed anything about the modules.
        self.view = ModuleView({k: m for k, m in modules.items() if isinstance(m, nn.Module)})
        now = dict(self.view.source)
        if missing := [name for name in layer.fast if _FAST + name not in now]:
            raise InvalidInputError(
                f"module has no parameter {missing[0]!r} any more, which is a fast weight: make a "
                "new FastWeights of the changed module"
            )
        self.rows = torch_private.over_rows(len(x))
        self.start = {n: _stacked(now.pop(_FAST + n), len(x)) for n in layer.fast}
        for name, p in self.start.items():
            check_has_values(f"the fast weight {name!r}", p)
        self.slow: Named = now
        self.buffers: Named = self.view.source_buffers
        self.rates = None if layer.hyper is None else layer.hyper()
        rule = layer.optimizer
        self.rule = rule if isinstance(rule, Elementwise) else PerSample(rule)

    def chunk_read_at(self, t: int) -> int:
        """Return which chunk is answered in step t, by the weights before that step."""
        return t - 1 if self.after else t

    def evaluate(
        self,
        fast: Params,
        slow: Named,
        buffers: Named,
        data: tuple[Tensor, ...] | None,
        x: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the losses of all samples ``[B]`` and the outputs; None for what is not asked."""
        placed = {**slow, **_as_viewed(fast)}
        return self.view.run(placed, buffers, self._evaluate, fast, data, x)[0]

    def _evaluate(
        self, fast: Params, data: tuple[Tensor, ...] | None, x: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Do what `evaluate` does, inside of `ModuleView.run`."""
        before = self.view.read_buffers()
        with self.rows as rows:
            self.view.write(_as_viewed({name: rows.row(p) for name, p in fast.items()}))
            found = self._of_sample(
                None if data is None else [rows.row(leaf) for leaf in data],
                None if x is None else rows.row(x),
            )
            stacked = [rows.stacked(row) for row in found]
        after = self.view.read_buffers()
        for name, buffer in before.items():
            # A copy for this call, which nobody else writes.
            written = torch_private.version(torch_private.innermost(buffer))
            if written or after[name] is not buffer:
                raise InvalidInputError(_WRITES.format(f" ({name!r})"))
        out = None if x is None else stacked.pop()
        return (None if data is None else stacked[0]), out

    def _of_sample(self, data: list[Tensor] | None, x: Tensor | None) -> list[Tensor]:
        """Run the user's code for one sample, in `ModuleView.run`."""
        modules = self.view.module
        found: list[Tensor] = []
        # Checkpointed parts run as they are under vmap, where PyTorch's checkpoint does not.
        with replacing(), block.reading(None):
            if data is not None:
                function = modules.get("loss", self.loss)
                loss = function(modules["module"], tree.join(self.template, data))
            if x is not None:
                read = modules.get("output", self.output)
                out = modules["module"](x) if read is None else read(modules["module"], x)
        if data is not None:
            found.append(check_loss(loss, "what loss(module, data) returns for one sample"))
        if x is not None:
            found.append(_check_output(out, x))
        return found

    def plain(self) -> Tensor:
        """Run all steps; autograd keeps their graph if anything is to be differentiated."""
        return self.view.run(_as_viewed(self.start), self.buffers, self._plain)[0]

    def _plain(self) -> Tensor:
        """Do what `plain` does, inside of `ModuleView.run`."""
        given = [*self.start.values(), *self.slow.values(), *self.leaves]
        given += [*tree.tensors(self.rates), *self.x]
        recording = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        params, state = self.start, self.rule.init(self.start)
        outputs: list[Tensor] = []
        losses: list[Tensor] = []
        for t in range(self.steps):
            read = self.chunk_read_at(t)
            loss, out, grads = self._gradient(
                params, self.data[t], self.x[read] if read >= 0 else None, recording
            )
            losses.append(loss)
            if out is not None:
                outputs.append(out)
            params, state = self.rule.update(grads, state, params, self.rates)
        outputs.append(_given(self._evaluate(params, None, self.x[-1])[1]))
        self.check_finite(losses, params)
        return torch.cat(outputs, 1)

    def _gradient(
        self, params: Params, data: tuple[Tensor, ...], x: Tensor | None, recording: bool
    ) -> tuple[Tensor, Tensor | None, Grads]:
        """Return the losses and outputs of one chunk, and the gradient of each sample."""
        with torch.enable_grad():
            own = {
                n: p if p.requires_grad else p.detach().requires_grad_() for n, p in params.items()
            }
            with refusing_recomputation(), refusing_writes(own):
                found_losses, out = self._evaluate(own, data, x)
            losses = _given(found_losses)
            # What is upstream of the layer is differentiated once only: the walk ends there.
            check_graph([losses], own.values(), second_order=recording, stops=data)
            found = inner_gradient(losses, own, create_graph=recording, independent=_independent)
            grads = {
                n: torch.zeros_like(own[n]) if g is None else g for n, g in finish(found).items()
            }
        if recording:
            return losses, out, grads
        return tree.map_tensors(Tensor.detach, (losses, out, grads))

    def unrolled(self, strategy: Strategy | None) -> Tensor:
        """Run the steps as `unroll` does, with any strategy and inside transforms."""
        if not self.steps:
            return self._last(self.start)

        def loss(params: Params, hyper: Any, t: int) -> tuple[Tensor, Tensor]:
            x = self._chunk_of(hyper["x"], max(self.chunk_read_at(t), 0))
            groups = hyper["data"] if self.own_data else [hyper["x"]]
            data = tuple(self._chunk_of(group, t) for group in groups)
            if self.chunk_read_at(t) >= 0:
                losses, out = self.evaluate(params, hyper["slow"], hyper["buffers"], data, x)
            else:
                # Every step has to return as much; this one's is not used.
                losses, _ = self.evaluate(params, hyper["slow"], hyper["buffers"], data, None)
                with at_random_state(RandomState.now()), torch.no_grad():
                    _, out = self.evaluate(params, hyper["slow"], hyper["buffers"], None, x)
            return _given(losses).sum(), _given(out)

        problem = Problem(loss, self.rule, optimizer_hyper=lambda hyper, t: hyper["rates"])
        hyper = {
            "x": self._grouped(self.whole),
            "data": [self._grouped(leaf) for leaf in self.leaves] if self.own_data else [],
            "slow": self.slow,
            "buffers": self.buffers,
            "rates": self.rates,
        }
        # Their own memory, for forward mode writes into what it was given.
        start = {name: p.contiguous() for name, p in self.start.items()}
        for p in start.values():
            warn_of_half(p)
        traj = unroll(problem, start, list(range(self.steps)), hyper=hyper, strategy=strategy)
        read = traj.aux.unbind()[1 if self.after else 0 :]
        return torch.cat([*read, self._last(traj.params)], 1)

    def _grouped(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Cut a sequence into groups of chunks.

        A step sends back a gradient of the size of its group. A single tensor would make the time
        quadratic in the length, and so would a tensor for each chunk, at all of which a strategy
        looks in each step.
        """
        return whole.split(GROUP * self.size, dim=1)

    def _chunk_of(self, groups: Sequence[Tensor], t: int) -> Tensor:
        """Return chunk t."""
        place, inside = divmod(t, GROUP)
        return groups[place].narrow(1, inside * self.size, self._length(t))

    def _length(self, t: int) -> int:
        return self.x[t].shape[1]

    def _last(self, params: Params) -> Tensor:
        """Return the outputs of the last chunk."""
        return _given(self.evaluate(params, self.slow, self.buffers, None, self.x[-1])[1])

    def check_finite(self, losses: list[Tensor], params: Params) -> None:
        """Raise unless the losses and the last weights are finite."""
        if losses and not is_finite(found := torch.stack(losses)):
            t, sample = (~found.isfinite()).nonzero()[0].tolist()
            raise NonFiniteError(
                f"the inner loss of chunk {t} of sample {sample} is not finite. {_LOWER}"
            )
        for name, p in params.items():
            if not is_finite(p):
                raise NonFiniteError(
                    f"the fast weight {name!r} is not finite after the last chunk. {_LOWER}"
                )


_LOWER = "Lower the inner learning rate, or look for NaN in x and data"


class PerSample(Optimizer):
    """A rule that looks at tensors as a whole, applied to each row of stacked ones.

    Args:
        rule: the rule for one sample.
    """

    def __init__(self, rule: Optimizer) -> None:
        self.rule = rule
        self.compiles = rule.compiles

    def init(self, params: Params) -> Any:
        return self._over_samples(self.rule.init, params)

    def update(
        self, grads: Grads, state: Any, params: Params, hyper: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Any]:
        def of_sample(grads: Grads, state: Any, params: Params) -> tuple[dict[str, Tensor], Any]:
            return self.rule.update(grads, state, params, hyper)

        found: tuple[dict[str, Tensor], Any] = self._over_samples(of_sample, grads, state, params)
        return found

    def _over_samples(self, function: Callable[..., Any], *args: object) -> Any:
        tensors, template = tree.split(args)
        box: list[Any] = []

        def of_sample(values: list[Tensor]) -> list[Tensor]:
            found, rest = tree.split(function(*tree.join(template, values)))
            box[:] = [rest]
            return found

        stacked = torch.func.vmap(of_sample, randomness="different")(tensors)
        return tree.join(box[0], stacked)

    def __repr__(self) -> str:
        return repr(self.rule)


def _as_viewed(fast: Named) -> dict[str, Tensor]:
    """Return the fast weights by their names in the view of all the modules."""
    return {_FAST + name: p for name, p in fast.items()}


def _stacked(p: Tensor, count: int) -> Tensor:
    """Return a row for each sample."""
    # A view of a leaf requires grad even if it is made under no_grad.
    return (p if torch.is_grad_enabled() else p.detach()).expand(count, *p.shape)


def _given(x: Tensor | None) -> Tensor:
    """Return what was asked for."""
    assert x is not None
    return x


def _independent() -> Exception:
    return NotDifferentiableError(
        "the inner loss does not depend on the fast weights: compute it from the `module` that "
        "loss(module, data) is given"
    )


def _check_function(name: str, function: object, second: str) -> None:
    """Raise unless ``function`` takes the module and one thing more."""
    if not callable(function) or isinstance(function, type):
        raise InvalidInputError(
            f"{given(name, function)}: write a function {name}(module, {second}), or an nn.Module "
            "with that forward"
        )
    called = function.forward if isinstance(function, nn.Module) else function
    check_takes(name, called, "module", second)


def _check_optimizer(optimizer: object) -> None:
    refuse_class(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise InvalidInputError(
            f"{given('optimizer', optimizer)}: write one of innerloop.optim, "
            "innerloop.optim.sgd(lr=0.1)"
        )
    if optimizer.needs_closure:
        raise InvalidInputError(
            f"{optimizer!r} evaluates the loss within its update, as often as each sample needs, "
            "and the samples of a layer run together: write another rule, "
            "innerloop.optim.sgd(lr=0.1)"
        )


def _as_module(hyper: object, optimizer: Optimizer) -> nn.Module | None:
    """Return the learned hyper-parameters as a module that returns them."""
    if hyper is None or isinstance(hyper, nn.Module):
        return hyper
    if not isinstance(hyper, Mapping) or not all(
        isinstance(value, nn.Parameter) for value in hyper.values()
    ):
        raise InvalidInputError(
            f"{given('hyper', hyper)}: write a dict of nn.Parameter by name, "
            '{"lr": nn.Parameter(torch.tensor(0.1))}, or an nn.Module that returns a dict of '
            "tensors; numbers belong in the optimizer"
        )
    known = hyper_names(optimizer)
    for name in hyper:
        if known is not None and name not in known:
            raise InvalidInputError(f"hyper has {name!r}, but {optimizer!r} has {', '.join(known)}")
    return _Learned(hyper)


def _check_sequences(x: object, leaves: list[Tensor]) -> None:
    """Raise unless these are samples of the same number of tokens."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise InvalidInputError(f"{given('x', x)}: write a tensor [samples, tokens, ...]")
    if not leaves:
        raise InvalidInputError("data holds no tensor: write tensors [samples, tokens, ...]")
    if 0 in x.shape[:2]:
        raise InvalidInputError(
            f"x has shape {tuple(x.shape)}: there has to be a sample, and a token to read"
        )
    for leaf in leaves:
        if leaf.dim() < 2 or leaf.shape[:2] != x.shape[:2]:
            raise InvalidInputError(
                f"data has a tensor of shape {tuple(leaf.shape)}, and x has {tuple(x.shape)}: both "
                "begin with the samples and the tokens, [B, T, ...]"
            )
    for tensor in (x, *leaves):
        check_not_inference("x or data", tensor)
        check_has_values("x or data", tensor)


def _check_output(out: object, x: Tensor) -> Tensor:
    """Return the outputs of one sample; raise unless they are one for each token."""
    if not isinstance(out, Tensor) or out.dim() < 1 or out.shape[0] != x.shape[0]:
        raise InvalidInputError(
            f"the output for a chunk of {x.shape[0]} tokens is {shown(out)}: it has to be a tensor "
            "with one row for each token, [chunk, ...]; module and output run on one sample, "
            "without the dimension of the samples"
        )
    return out


_WRITES = (
    "module, loss or output writes a buffer{0}, which all samples would share: call eval() on the "
    "norms with running statistics, or write track_running_stats=False, or use LayerNorm"
)


def _explained(error: RuntimeError) -> RuntimeError:
    text = str(error)
    if writes_without_rows(text, below_vmap=True):
        return InvalidInputError(f"{_WRITES.format('')}. PyTorch says: {text}")
    return explain(error)
