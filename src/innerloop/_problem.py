"""What one step of training is: a loss and an optimizer, kept as separate factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Generic, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import Node

from innerloop._carry import Carry, _alias, aliased
from innerloop._inner_gradient import block
from innerloop._inner_gradient.closure import CachedFirstEvaluation
from innerloop._inner_gradient.gradient import (
    Hook,
    check_graph,
    finish,
    inner_gradient,
    sent_sparse,
    with_dense_gradients,
)
from innerloop._inner_gradient.loss import INDEPENDENT, check_loss
from innerloop._inner_gradient.stored import Outside
from innerloop._inner_gradient.torch_errors import explain
from innerloop._micro_batches import MicroBatches, check_parts, check_written
from innerloop._module import view as module
from innerloop._module.checks import (
    check_names,
    check_not_inference,
    refusing_recomputation,
    refusing_writes,
)
from innerloop._types import (
    Aux,
    Batch,
    Grads,
    HyperTree,
    Loss,
    Module,
    ModuleLoss,
    Named,
    Params,
    ValueAndGrad,
)
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_has_values, check_takes, given, shown
from innerloop._utils.execution import Mode, below_vmap, may_call_autograd, mode
from innerloop._utils.random_state import RandomState
from innerloop.errors import InnerLoopError, InvalidInputError, NotDifferentiableError
from innerloop.nn._mode import replacing
from innerloop.optim._base import Optimizer, refuse_class, refuse_uncompiled
from innerloop.optim._chain import Chain
from innerloop.optim._engine.grads import sparse_ones
from innerloop.optim._from_torch.from_torch import FromTorch
from innerloop.optim._groups import Groups
from innerloop.optim._transforms.grad_callback import GradCallback

Gradient = tuple[dict[str, Tensor], Float[Tensor, ""], Aux, dict[str, Tensor]]
OptimizerHyper = Sequence[str] | Callable[[Any, int], Mapping[str, Any] | None]


class _WithTargets(NamedTuple):
    """A batch, and what ``targets`` made of it."""

    batch: Any
    targets: Any


class Problem(Generic[Batch, Aux]):
    r"""One step of training: a loss :math:`\ell`, an update rule :math:`u` with state :math:`s`.

    .. math::
        (\theta_{t+1}, s_{t+1})
        = u(\nabla_\theta\, \ell(\theta_t, \lambda, b_t), s_t, \theta_t, \lambda)

    The factors stay separate because strategies need them: the symmetry of the Hessian of ``loss``,
    the residual
    :math:`\nabla_\theta \ell`, the update rule.

    Args:
        loss: ``loss(params, hyper, batch) -> scalar`` or ``(scalar, aux)``, a function of its
            arguments. Tensors that need a gradient belong in ``params`` or ``hyper``.
        optimizer: from `innerloop.optim`.
        optimizer_hyper: how the optimizer takes its hyper-parameters from ``hyper``: the names of
            the entries that it reads, ``("lr", "weight_decay")``, or a function
            ``optimizer_hyper(hyper, t) -> dict``, for example ``lambda hyper, t: {"lr":
            hyper["log_lr"][t].exp()}``. Default: the optimizer reads nothing; ``()`` says so, for
            an entry of ``hyper`` that only happens to have the name of a hyper-parameter.
        targets: ``targets(params, hyper, batch)`` computes what a step holds constant (TD targets,
            a teacher) and is differentiated all the same: it is evaluated outside of the inner
            derivative, once in a step, and its result is passed on as ``loss(params, hyper, batch,
            targets)``. What the loss itself detaches is constant in every derivative.

    Note:
        For a type checker this is ``Problem[Batch, Aux]``: what the loss takes as a batch, and what
        it returns besides the scalar. A bare ``Problem`` leaves both open.

    Example:
        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: (params["w"] - batch) ** 2 / 2,
        ...     innerloop.optim.sgd(lr=0.5),
        ... )
        >>> traj = innerloop.unroll(problem, {"w": torch.tensor(8.0)}, [torch.tensor(0.0)] * 3)
        >>> traj.params["w"], traj.losses
        (tensor(1.), tensor([32.,  8.,  2.]))
    """

    def __init__(
        self,
        loss: Loss[Batch, Aux],
        optimizer: Optimizer,
        *,
        optimizer_hyper: OptimizerHyper | None = None,
        targets: Callable[[dict[str, Tensor], Any, Batch], object] | None = None,
    ) -> None:
        if not callable(loss):
            raise InvalidInputError(
                f"loss must be a function loss(params, hyper, batch), got {type(loss).__name__}"
            )
        refuse_class(optimizer)
        if not isinstance(optimizer, Optimizer):
            cure = (
                "innerloop.optim.from_torch(optimizer)"
                if isinstance(optimizer, torch.optim.Optimizer)
                else "innerloop.optim.sgd(lr=0.1)"
            )
            raise InvalidInputError(
                f"optimizer is {type(optimizer).__name__}, not one of innerloop.optim: write {cure}"
            )
        self.loss: Callable[..., Tensor | tuple[Tensor, Aux]] = loss
        self.optimizer = optimizer
        self.optimizer_hyper: Callable[[Any, int], Mapping[str, Any] | None] | None = (
            optimizer_hyper
            if optimizer_hyper is None or callable(optimizer_hyper)
            else _ReadByName(optimizer_hyper, optimizer)
        )
        if targets is not None and not callable(targets):
            raise InvalidInputError(
                "targets must be a function targets(params, hyper, batch), got "
                f"{type(targets).__name__}"
            )
        if targets is not None and isinstance(loss, MicroBatches):
            raise InvalidInputError(
                "targets= computes the targets of the whole batch at once, and loss is "
                "micro_batches(...): compute them in the loss, of its part"
            )
        if targets is not None:
            check_takes("targets", targets, "params", "hyper", "batch")
            check_takes("loss", loss, "params", "hyper", "batch", "targets")
        else:
            check_takes("loss", loss, "params", "hyper", "batch")
        if optimizer_hyper is not None and callable(optimizer_hyper):
            check_takes("optimizer_hyper", optimizer_hyper, "hyper", "t")
        self.targets: Callable[..., object] | None = targets
        self.view: module.ModuleView | None = None
        self._read: block.ReadModule | None = None
        self.original: Problem[Batch, Aux] | None = None
        """The user's problem, of which this is the copy for one run."""
        self.computed_buffers: set[str] = set()
        """Buffers that may have a derivative in this run.

        They require grad at the start, or the module changes them. Running statistics are not
        among them: the norms write those without a graph.
        """
        self.outside: Outside | None = None
        """What is outside of the loop while it runs on constants."""
        self.shows_params = False
        """True if a compiled pullback of a step gives its new parameters as well."""
        self._first = False
        """True until the first loss since `init` is evaluated, on copies of the parameters."""
        self._sparse: set[str] = set()
        """Parameters to which a loss of this run may send a sparse gradient."""

    @classmethod
    def from_module(
        cls,
        model: Module,
        loss: ModuleLoss[Module, Batch, Aux],
        optimizer: Optimizer,
        *,
        optimizer_hyper: OptimizerHyper | None = None,
        targets: Callable[[Module, Any, Batch], object] | None = None,
    ) -> Problem[Batch, Aux]:
        """Make a problem from ``loss(model, hyper, batch)``, written with the module itself.

        The module's buffers (running statistics) and the random state are threaded through the
        loop; the user's module is not changed. ``params`` of `unroll` is then
        None (all trainable parameters of the module), or a part of
        ``dict(model.named_parameters())``; other parameters keep the module's values. ``targets``
        is here a function ``targets(model, hyper, batch)``.
        """
        if callable(loss):
            more = () if targets is None else ("targets",)
            check_takes("loss", loss, "model", "hyper", "batch", *more)
        # `evaluate` passes them the module where a problem without one passes its parameters.
        functions: Any = loss, targets
        problem = cls(
            functions[0], optimizer, optimizer_hyper=optimizer_hyper, targets=functions[1]
        )
        problem.view = module.ModuleView(model)
        problem._read = block.ReadModule(problem.view)
        if not optimizer.takes_sparse:
            module.look_up_densely(problem.view.modules)
        return problem

    def for_one_run(self, start: Carry) -> Problem[Batch, Aux]:
        """Return a copy that notes what is found out in one run; it is forgotten afterwards."""
        run = copy.copy(self)
        run.original = self.original or self
        run._sparse = set()  # noqa: SLF001
        run.computed_buffers = set()
        if self.view is not None:
            if mode() is Mode.EAGER:
                run._sparse |= self.view.sparse  # noqa: SLF001
            run.computed_buffers |= {
                name
                for name in self.view.no_statistics
                if name in start.buffers and torch_private.has_derivative(start.buffers[name])
            }
        return run

    def init(self, params: Params | Carry | None) -> Carry:
        """Return the carry before the first step; a carry is returned as it is."""
        self._first = True
        if isinstance(params, Carry):
            return params
        if params is None:
            params = self.trainable_params()
        for name, p in params.items() if isinstance(params, Mapping) else ():
            if not isinstance(p, Tensor):
                raise InvalidInputError(
                    f"{given(f'params[{name!r}]', p)}, and params must be a dict of named tensors: "
                    "write torch.as_tensor(...); nested dicts are written flat, "
                    "{'layer.weight': tensor}"
                )
        if not isinstance(params, Mapping):
            raise InvalidInputError(
                "params must be a dict of named tensors, or a carry (traj.at(-1)), got "
                f"{type(params).__name__}: for a module write "
                "dict(model.named_parameters())"
            )
        if not params:
            raise InvalidInputError("params is empty: there is nothing to train")
        for name, p in params.items():
            if not p.is_floating_point() and not p.is_complex():
                raise InvalidInputError(
                    f"params[{name!r}] has dtype {p.dtype}, which has no gradient: hand it in as "
                    "a batch or in hyper"
                )
            check_not_inference(f"params[{name!r}]", p)
            check_has_values(f"params[{name!r}]", p)
        buffers: dict[str, Tensor] = {}
        if self.view is not None:
            check_names(params, self.view.source)
            buffers = self.view.copies_of_buffers()
            if below_vmap():
                # Each task has running statistics of its own.
                for name in self.view.statistics_in_training():
                    buffers[name] = torch_private.with_rows(buffers[name])
        return Carry(dict(params), self.optimizer.init(params), buffers, RandomState.now())

    def first_since_init(self) -> bool:
        """Return True at the first call since `init`: what is evaluated then may be the user's."""
        first, self._first = self._first, False
        return first

    def trainable_params(self) -> dict[str, Tensor]:
        """Return the trainable parameters of the module that was given to `from_module`."""
        if self.view is None:
            raise InvalidInputError(
                "params is None, and the problem was not made from a module: pass a dict of "
                "tensors, or use Problem.from_module"
            )
        return {name: p for name, p in self.view.source.items() if p.requires_grad}

    def evaluate(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        hyper: HyperTree,
        batch: Batch | _WithTargets,
        *,
        second_order: bool = True,
    ) -> tuple[Float[Tensor, ""], tuple[Aux, dict[str, Tensor]]]:
        """Return ``(loss, (aux, new_buffers))``.

        If second derivatives will be taken, operations that lack them are replaced meanwhile.
        """
        more: tuple[object, ...] = ()
        if self.targets is not None:
            given, buffers = self.with_targets(params, buffers, hyper, batch)
            assert isinstance(given, _WithTargets)
            batch, more = given.batch, (given.targets,)
        blocks = nullcontext() if mode() is Mode.COMPILING else block.reading(self._read)
        with replacing() if second_order else nullcontext(), blocks:
            if isinstance(self.loss, MicroBatches):
                result, new_buffers = self._in_parts(params, buffers, hyper, batch), dict(buffers)
            elif self.view is None:
                result, new_buffers = self.loss(params, hyper, batch, *more), dict(buffers)
            else:
                loss_of = self._noting_buffers if self.view.no_statistics else self.loss
                result, new_buffers = self.view.run(
                    params, buffers, loss_of, self.view.module, hyper, batch, *more
                )
        aux: Any  # None, which `Aux` stands for where the loss returns the scalar alone
        loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        check_has_values("what loss(params, hyper, batch) returns", loss)
        return check_loss(
            loss,
            "what loss(params, hyper, batch) returns (alone, or first of a pair (scalar, aux))",
        ), (
            aux,
            new_buffers,
        )

    def _in_parts(
        self, params: Mapping[str, Tensor], buffers: Named, hyper: HyperTree, batch: object
    ) -> Any:
        """Evaluate the loss on one part of the batch after another."""
        whole, view = self.loss, self.view
        assert isinstance(whole, MicroBatches)
        if view is None:
            return whole.run(whole.loss, dict(params), hyper, batch, None)
        check_parts(view)

        def checked(*args: object) -> Any:
            before = view.read_buffers()
            found = whole.loss(*args)
            check_written(before, view.read_buffers())
            return found

        def part(params: Params, hyper: HyperTree, batch: object) -> Any:
            return view.run(params, buffers, checked, view.module, hyper, batch)[0]

        return whole.run(part, dict(params), hyper, batch, view)

    def with_targets(
        self, params: Named, buffers: Named, hyper: HyperTree, batch: Batch | _WithTargets
    ) -> tuple[Batch | _WithTargets, Named]:
        """Return the batch with its targets, outside of the inner derivative, and the buffers.

        A batch that has its targets already keeps them.
        """
        if self.targets is None or isinstance(batch, _WithTargets):
            return batch, buffers
        outside = self.outside
        if outside is None or mode() is not Mode.EAGER:
            return self._computed_targets(params, buffers, hyper, batch)
        return outside.call(
            lambda params, hyper: self._computed_targets(params, buffers, hyper, batch), params
        )

    def _computed_targets(
        self, params: Named, buffers: Named, hyper: HyperTree, batch: Batch
    ) -> tuple[_WithTargets, Named]:
        assert self.targets is not None
        try:
            blocks = nullcontext() if mode() is Mode.COMPILING else block.reading(self._read)
            with replacing(), blocks:
                if self.view is None:
                    return _WithTargets(batch, self.targets(params, hyper, batch)), buffers
                found, new = self.view.run(
                    params, buffers, self.targets, self.view.module, hyper, batch
                )
                return _WithTargets(batch, found), new
        except InnerLoopError:
            raise
        except RuntimeError as error:
            raise explain(error) from error

    def _noting_buffers(self, *args: Any) -> Any:
        """Evaluate the loss, and note which buffers it has changed.

        A buffer that is computed from constants now may be computed from variables in a replay.
        """
        assert self.view is not None
        if mode() is Mode.COMPILING:
            return self.loss(*args)
        before = self.view.read_buffers()
        versions = {name: torch_private.version(before[name]) for name in self.view.no_statistics}
        result = self.loss(*args)
        # Inside a transform the count of changes is that of a wrapper.
        transformed = mode() is Mode.TRANSFORMED
        after = self.view.read_buffers()
        self.computed_buffers.update(
            name
            for name, version in versions.items()
            if transformed
            or after[name] is not before[name]
            or torch_private.version(after[name]) != version
        )
        return result

    def gradient(
        self, params: Named, buffers: Named, hyper: HyperTree, batch: Batch | _WithTargets
    ) -> Gradient[Aux]:
        """Return ``(gradient with respect to params, loss, aux, new_buffers)``."""
        taken = self._by_autograd if may_call_autograd() else self._by_transform
        try:
            batch, buffers = self.with_targets(params, buffers, hyper, batch)
            return taken(params, buffers, hyper, batch)
        except InnerLoopError:
            raise
        except RuntimeError as error:
            raise explain(error) from error

    def _by_transform(
        self, params: Named, buffers: Named, hyper: HyperTree, batch: Batch | _WithTargets
    ) -> Gradient[Aux]:
        """Differentiate in vmap, jvp and compiled code, where torch.autograd.grad raises."""

        def objective(
            params: Params, buffers: Named, hyper: HyperTree, batch: Batch | _WithTargets
        ) -> tuple[Tensor, tuple[Tensor, Aux, dict[str, Tensor]]]:
            loss, (aux, new_buffers) = self.evaluate(params, buffers, hyper, batch)
            if mode() is not Mode.COMPILING and not torch_private.is_tracked(loss):
                raise NotDifferentiableError(INDEPENDENT)
            return loss, (loss, aux, new_buffers)

        # Everything is an argument: a tensor in the closure could not be written in place (buffers)
        # and breaks vmap.
        first = mode() is not Mode.COMPILING and self.first_since_init()
        given = {n: p.clone() if first else p for n, p in params.items()}
        with refusing_writes(given):
            grads, (loss, aux, new_buffers) = tree.grad_with_aux(objective)(
                given, buffers, hyper, batch
            )
        return self.for_the_rule(grads, params), loss, aux, new_buffers

    def _by_autograd(
        self, params: Named, buffers: Named, hyper: HyperTree, batch: Batch | _WithTargets
    ) -> Gradient[Aux]:
        """Differentiate in eager code.

        The derivative is the same, and a quarter faster on small models, where the transform's
        wrappers count.
        """
        recording = torch.is_grad_enabled()
        outside = self.outside
        seen, read = (params, hyper) if outside is None else (outside.params(params), outside.hyper)
        with torch.enable_grad():
            # An alias, so that the derivative is the partial one even if hyper or the batch was
            # computed from params.
            # The first time copies: a loss that writes its parameters would write the user's.
            first = self.first_since_init()
            copied = Tensor.clone if first else _alias
            alias = (
                seen
                if outside is not None and not first
                else {
                    n: copied(p)
                    if p.requires_grad
                    else (p.detach().clone() if first else p.detach()).requires_grad_()
                    for n, p in seen.items()
                }
            )
            with refusing_recomputation(), refusing_writes(alias):
                loss, (aux, new_buffers) = self.evaluate(alias, buffers, read, batch)
            # Only a loop that something outside asks a derivative of is recorded; else the step is
            # plain training.
            wanted = any(t.requires_grad for t in (*params.values(), *tree.tensors(hyper)))
            own = {id(p) for p in alias.values()}
            ends = [loss, *tree.tensors(aux), *new_buffers.values()]
            nodes: list[Node] = []
            leaves = check_graph(
                ends,
                alias.values(),
                second_order=recording,
                sparse=nodes,
                stops=() if outside is None else outside.now,
            )
            if nodes:
                self._sparse |= sent_sparse(nodes, alias)
            recording = recording and (wanted or any(id(leaf) not in own for leaf in leaves))
            grads = self.for_the_rule(
                inner_gradient(
                    loss,
                    alias,
                    create_graph=recording,
                    independent=lambda: NotDifferentiableError(INDEPENDENT),
                    keep_graph=outside is not None,
                ),
                params,
            )
        if recording:
            return grads, loss, aux, new_buffers
        return (grads, *tree.map_tensors(Tensor.detach, (loss, aux, new_buffers)))

    def for_the_rule(self, found: Grads, params: Params) -> dict[str, Tensor]:
        """Return a gradient for each parameter: zero for those that the loss does not use."""
        if sparse := sparse_ones(found):
            self._sparse |= sparse
        hooks, outside = self.parameter_hooks(params), self.outside
        # Where none is sparse, `finish` need not look again.
        as_they_are = not sparse or self.optimizer.takes_sparse
        if outside is None or not hooks:
            finished = finish(found, hooks=hooks, takes_sparse=as_they_are)
        else:
            tied = outside.gradients(finish(found, takes_sparse=as_they_are))
            finished = finish(tied, hooks=hooks, takes_sparse=True)
            finished = outside.constant(finished)
        return {
            name: torch.zeros_like(params[name]) if g is None else g for name, g in finished.items()
        }

    def check_overrides(self, hyper: HyperTree, t: int) -> None:
        """Raise, before the first step, if ``optimizer_hyper`` gives what the optimizer lacks."""
        given = self.overrides(hyper, t)
        if given is not None and not isinstance(given, Mapping):
            raise InvalidInputError(
                f"optimizer_hyper(hyper, t) returned {type(given).__name__}: write a dict by name, "
                'lambda hyper, t: {"lr": hyper["lr"]}'
            )
        known = hyper_names(self.optimizer)
        for name in given or ():
            if known is not None and name not in known:
                raise InvalidInputError(
                    f"optimizer_hyper(hyper, t) gives {name!r}: {self.optimizer!r} has no "
                    f"hyper-parameter {name!r}; it has {', '.join(known)}"
                )

    def unread_names(self, hyper: HyperTree) -> list[str]:
        """Return the entries of ``hyper`` that look as if the optimizer read them, but it does not.

        The loss may read them.
        """
        if self.optimizer_hyper is not None or not isinstance(hyper, Mapping):
            return []
        known = hyper_names(self.optimizer) or ()
        return [
            name
            for name, value in hyper.items()
            if name in known and any(map(tree.differentiable, tree.leaves(value)))
        ]

    def unread(self, name: str) -> str:
        """Say, for an error, that neither the optimizer nor the loss reads ``hyper[name]``."""
        kind = repr(self.optimizer).partition("(")[0]
        return (
            f"no gradient arrives at hyper[{name!r}]. {kind} has a hyper-parameter of that name, "
            "but reads it only if you say so: write "
            f"Problem(loss, optimizer, optimizer_hyper=({name!r},)), or optimizer_hyper=() if the "
            "name means something else"
        )

    def parameter_hooks(self, params: Named) -> list[tuple[str, Hook]]:
        """Return the hooks of the module's own parameters, which training runs on gradients."""
        if self.view is None:
            return []
        own = self.view.source
        return [(n, hook) for n in params for hook in torch_private.gradient_hooks(own[n])]

    def overrides(self, hyper: HyperTree, t: int) -> Mapping[str, Any] | None:
        """Return the optimizer's hyper-parameters at step t; None for its own."""
        if self.optimizer_hyper is None:
            return None
        if self.outside is None or mode() is not Mode.EAGER:
            return self.optimizer_hyper(hyper, t)
        return self.outside.constant(self.optimizer_hyper(self.outside.hyper, t))

    def update(
        self,
        carry: Carry,
        grads: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        hyper: HyperTree,
        t: int,
        value_and_grad: ValueAndGrad | None = None,
    ) -> Carry:
        """Return the carry after step t, given its gradient and the buffers that came with it."""
        params, state = self.new_params(
            grads, carry.optimizer_state, carry.params, self.overrides(hyper, t), value_and_grad
        )
        params = with_dense_gradients(aliased(params, carry.params), self._sparse)
        return Carry(params, state, dict(buffers), RandomState.now(), t + 1)

    def new_params(
        self,
        grads: Mapping[str, Tensor],
        state: object,
        params: Named,
        overrides: Mapping[str, Any] | None,
        value_and_grad: ValueAndGrad | None = None,
    ) -> tuple[dict[str, Tensor], Any]:
        """Return ``(new_params, new_state)``, which the optimizer makes of these gradients."""
        outside = self.outside
        if outside is not None and _calls_back(self.optimizer):
            tied = outside.gradients(grads)
            return outside.constant(self.optimizer.update(tied, state, params, overrides))
        if not self.optimizer.needs_closure:
            return self.optimizer.update(grads, state, params, overrides)
        if value_and_grad is None:
            raise InvalidInputError(
                f"{self.optimizer!r} evaluates the loss within its update, and this strategy "
                "takes loss and update apart: write "
                'StoreAll() or Checkpointed(product="reverse", save="params")'
            )
        closure: Any = {"value_and_grad": value_and_grad}
        return self.optimizer.update(grads, state, params, overrides, **closure)

    def check_compiles(self) -> None:
        """Raise if the optimizer cannot be compiled."""
        refuse_uncompiled(self.optimizer)

    def step(
        self, carry: Carry, hyper: HyperTree, batch: Batch, t: int
    ) -> tuple[Carry, Float[Tensor, ""], Aux]:
        """Take one step of training: ``(new_carry, loss, aux)``."""
        start: Named = carry.buffers
        given: Batch | _WithTargets = batch
        if self.optimizer.needs_closure:
            # The targets are those of the step, however often the rule evaluates the loss.
            given, start = self.with_targets(carry.params, start, hyper, batch)
        grads, loss, aux, buffers = self.gradient(carry.params, start, hyper, given)
        held = dict(buffers)

        def evaluate(params: Named) -> tuple[Tensor, dict[str, Tensor]]:
            grads, loss, _, buffers = self.gradient(params, held, hyper, given)
            held.update(buffers)
            return loss, grads

        closure = (
            CachedFirstEvaluation(evaluate, carry.params, loss, grads)
            if self.optimizer.needs_closure
            else None
        )
        new = self.update(carry, grads, held, hyper, t, closure)
        return new._replace(buffers=held), loss, aux

    def __repr__(self) -> str:
        return f"Problem({getattr(self.loss, '__name__', self.loss)!s}, {self.optimizer!r})"


def check_problem(problem: object) -> None:
    """Raise unless ``problem`` is a `Problem`."""
    if not isinstance(problem, Problem):
        raise InvalidInputError(
            f"expected an innerloop.Problem, got {shown(problem)}: write "
            "innerloop.Problem(loss, optimizer)"
        )


def rules_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return the rules of an optimizer: those of its groups, or itself."""
    if not isinstance(optimizer, (Groups, FromTorch)):
        return [optimizer]
    members = optimizer.members
    each = members.values() if isinstance(members, Mapping) else members
    return [rule for member in each for rule in rules_of(member)]


def _calls_back(optimizer: Optimizer) -> bool:
    """True if it calls a function of the user's with gradients."""
    return any(
        isinstance(transform, GradCallback)
        for rule in rules_of(optimizer)
        if isinstance(rule, Chain)
        for transform in rule.transforms.values()
    )


def hyper_names(optimizer: Optimizer) -> tuple[str, ...] | None:
    """Return the names of an optimizer's hyper-parameters; None if it does not list them."""
    found: dict[str, None] = {}
    for rule in rules_of(optimizer):
        names = getattr(rule, "hyper_names", None)
        if names is None:
            return None
        found |= dict.fromkeys(names)
    return tuple(found)


class _ReadByName:
    """The function ``optimizer_hyper`` of an optimizer that reads entries of ``hyper`` by name."""

    def __init__(self, names: Sequence[str], optimizer: Optimizer) -> None:
        fits = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
        if not fits:
            raise InvalidInputError(
                f"optimizer_hyper={names!r}: write a tuple of names, "
                "optimizer_hyper=('lr',), or a function of (hyper, t)"
            )
        known = hyper_names(optimizer)
        for name in names:
            if known is not None and name not in known:
                kind = repr(optimizer).partition("(")[0]
                raise InvalidInputError(
                    f"optimizer_hyper names {name!r}, but {kind} has {', '.join(known)}"
                )
        self.names = tuple(names)

    def __call__(self, hyper: HyperTree, t: int) -> dict[str, Any]:
        if self.names and not isinstance(hyper, Mapping):
            raise InvalidInputError(
                f"optimizer_hyper names {self.names[0]!r}, but hyper is {type(hyper).__name__}: "
                f"write a dict, hyper={{{self.names[0]!r}: tensor}}"
            )
        assert isinstance(hyper, Mapping) or not self.names
        found: dict[str, Any] = {}
        for name in self.names:
            if name not in hyper:  # type: ignore[operator]
                raise InvalidInputError(
                    f"optimizer_hyper names {name!r}, but hyper has no such entry; it has "
                    f"{list(hyper)}"  # type: ignore[arg-type]
                )
            found[name] = hyper[name]  # type: ignore[index, call-overload]
        return found


def residual(problem: Problem[Batch, Aux], carry: Carry, hyper: HyperTree, batch: Batch) -> Grads:
    """Compute the inner gradient at ``carry`` as constants.

    It is zero where the inner problem is solved; its derivatives at a solution are what implicit
    differentiation needs.

    Args:
        problem: the loss; the update rule plays no part.
        carry: where to evaluate; nothing in it is changed.
        hyper: the outer variables, as in `unroll`.
        batch: the data of this step.

    Returns:
        A gradient for each parameter, zero where the loss does not use it.
    """
    params, buffers, constants = tree.map_tensors(
        Tensor.detach, (carry.params, carry.buffers, hyper)
    )
    with torch.no_grad():
        grads, *_ = problem.gradient(params, buffers, constants, batch)
    return tree.map_tensors(Tensor.detach, grads)
