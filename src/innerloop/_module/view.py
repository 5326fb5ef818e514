"""Modules whose parameters can be replaced, once or step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from innerloop._module.checks import (
    by_name,
    check_module,
    in_tables,
    named_buffers,
    named_parameters,
    standing_in,
)
from innerloop._module.copier import GONE, Gate, _Copier, plain, refusal
from innerloop._utils import torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError

_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


class ModuleView:
    """A copy of the user's module whose parameters and buffers are tensors that can be replaced.

    The tree of modules is copied (same classes, same attributes, same hooks), not the tensors, not
    anything else. It is the user's code that runs, without any wrapper in between; ``isinstance``
    holds, hooks fire, submodules can be called alone, a tensor that stands in several places is
    replaced in all of them. The user's own module is never touched.

    Args:
        model: a module, or a dict of modules.
        gate: tells when a backward pass must not read the parameters.

    Attributes:
        module: the copy.
        source, source_buffers: the user's own parameters and buffers by name.
        statistics: the names of the running statistics of batch and instance norms, which PyTorch
            does not differentiate.
        lock: what a thread holds while it runs the copy.
    """

    def __init__(
        self, model: nn.Module | Mapping[str, nn.Module], gate: Gate | None = None
    ) -> None:
        if not isinstance(model, (nn.Module, Mapping)):
            raise InvalidInputError(
                f"expected an nn.Module, or a dict of modules, got {type(model).__name__}"
            )
        modules = {"": model} if isinstance(model, nn.Module) else dict(model)
        for module in modules.values():
            check_module(module)
        tables = list(in_tables(model))
        if all(torch_private.lists_its_tables(part) for _, part in tables):
            source, source_buffers = (
                by_name(standing_in(tables, table))
                for table in (torch_private.parameter_table, torch_private.buffer_table)
            )
        else:
            source = by_name(named_parameters(model))
            source_buffers = by_name(named_buffers(model))
            # Listing may have registered parameters anew, so the tables are walked after it.
            tables = list(in_tables(model))
            source, source_buffers = _as_they_stand(tables, source, source_buffers)
        copier = _Copier(gate, [*source.values(), *source_buffers.values()])
        copier.inside = {id(part) for _, part in tables}
        copies = {key: copier.copy(plain(module)) for key, module in modules.items()}
        self.module: Any = copies[""] if isinstance(model, nn.Module) else copies
        self._modes = copier.modes
        self._gate = gate
        self._training: list[bool] | None = None
        self.lock = threading.RLock()
        self.source, self.source_buffers = source, source_buffers
        for name, p in self.source.items():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise InvalidInputError(
                    f"parameter {name!r} is not initialised yet: call the (lazy) model once on an "
                    "example batch"
                )
        self.statistics = {
            prefix + key
            for prefix, module in tables
            if isinstance(module, _NORMS)
            for key in torch_private.buffer_table(module)
        }
        listed = {id(p): name for name, p in self.source.items()}
        self.sparse = {
            listed[id(p)]
            for _, module in tables
            if _has(module, "sparse")
            for p in torch_private.parameter_table(module).values()
            if id(p) in listed
        }
        """Parameters of an ``nn.Embedding(sparse=True)``: their gradients may be sparse."""
        self.no_statistics = [
            name
            for name, b in self.source_buffers.items()
            if tree.differentiable(b) and name not in self.statistics
        ]
        """Buffers that may have a derivative: kernels write running statistics without one."""
        self.parameters = {name: copier.places_of(name, p) for name, p in self.source.items()}
        self._tables = [(name, *places[0]) for name, places in self.parameters.items()]
        self.buffers = {name: copier.places_of(name, b) for name, b in self.source_buffers.items()}

    def hand_over(self) -> Any:
        """Return the copy, and let go of it.

        The view can then be kept inside the copy without a cycle, to `read` and to `write`.
        """
        module, self.module, self._modes = self.module, None, []
        return module

    @property
    def modules(self) -> list[nn.Module]:
        """Return all modules of the copy."""
        return [copied for copied, _ in self._modes]

    @property
    def originals(self) -> list[nn.Module]:
        """Return the user's own modules, in the order of `modules`."""
        return [original for _, original in self._modes]

    @property
    def training(self) -> list[bool]:
        """Return the mode of each module: the user's own now, unless inside `in_modes`."""
        return (
            [original.training for _, original in self._modes]
            if self._training is None
            else self._training
        )

    @contextmanager
    def in_modes(self, training: list[bool]) -> Iterator[None]:
        """Run in these modes: those of an earlier run, which is being replayed."""
        before, self._training = self._training, training
        try:
            yield
        finally:
            self._training = before

    def replaced_submodule(self, copy: ModuleView) -> str | None:
        """Return the name of a submodule that has come, gone or been replaced since the beginning.

        Args:
            copy: another view of the same module, in which nothing was.
        """
        ours, theirs = self.modules, copy.modules
        places = {id(module): i for i, module in enumerate(theirs)}
        roots = self.module if isinstance(self.module, dict) else {"": self.module}
        prefixes = {
            id(part): f"{key}.{name}".strip(".")
            for key, root in roots.items()
            for name, part in root.named_modules()
        }
        for mine, other in zip(ours, theirs, strict=True):
            now, then = torch_private.module_table(mine), torch_private.module_table(other)
            for name in {**then, **now}:
                place = places.get(id(then.get(name)), -1)
                if now.get(name) is not (ours[place] if place >= 0 else then.get(name)):
                    return f"{prefixes.get(id(mine), '')}.{name}".strip(".")
        return None

    def is_readable(self) -> bool:
        """True unless a backward pass is running in which the newest parameters are not right."""
        return self._gate is None or not self._gate.refuses()

    def read(self) -> dict[str, Tensor]:
        """Return the parameters as they are now (the user may have edited or replaced one)."""
        if self._gate is not None and self._gate.refuses():
            raise refusal(next(iter(self.parameters), ""))
        try:
            # Not as a module reads them, which is noted: the first place is a module's table.
            return {n: dict.__getitem__(table, key) for n, table, key in self._tables}
        except KeyError:
            pass
        gone = next(n for n, places in self.parameters.items() if places[0][1] not in places[0][0])
        raise InvalidInputError(GONE.format(gone.rpartition(".")[2]))

    def read_buffers(self) -> dict[str, Tensor]:
        """Return the buffers as they are now."""
        return {name: places[0][0][places[0][1]] for name, places in self.buffers.items()}

    def copies_of_buffers(self) -> dict[str, Tensor]:
        """Return copies of the user's own buffers, for the start of a loop.

        One that requires grad is no running statistic: it stays connected to where it comes from.
        """
        with torch.enable_grad():
            return {
                name: b.clone() if b.requires_grad else b.detach().clone()
                for name, b in self.source_buffers.items()
            }

    def statistics_in_training(self) -> set[str]:
        """Return the names of the running means and variances that the next forward writes."""
        training = {
            id(statistic)
            for (module, _), trains in zip(self._modes, self.training, strict=True)
            if trains
            for key in ("running_mean", "running_var")
            # A norm may have been built without.
            if (statistic := torch_private.buffer_table(module).get(key)) is not None
        }
        return {name for name, b in self.read_buffers().items() if id(b) in training}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the places of parameters."""
        for name, tensor in tensors.items():
            for container, key in self.parameters[name]:
                container[key] = tensor

    def write_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the places of buffers."""
        for name, tensor in tensors.items():
            for container, key in self.buffers[name]:
                container[key] = tensor

    def renew_written_buffers(self) -> dict[str, Tensor]:
        """Put a copy in the place of each buffer that was written in place; return those.

        The graph of a step may hold the tensor that was written; it stays as it is from now on.
        """
        written = {n: b for n, b in self.read_buffers().items() if torch_private.version(b)}
        self.write_buffers({name: buffer.clone() for name, buffer in written.items()})
        return written

    def run(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Call ``function`` while these parameters and copies of these buffers are in place.

        It returns ``(function(*args, **kwargs), new_buffers)``.

        Not ``torch.func.functional_call``: up to torch 2.13 that does not see a parameter which
        also stands in a list, and leaves its tensors behind in a module that is registered twice.
        """
        # One copy for all threads: they take turns. (Compiled code runs where it was compiled, and
        # knows no locks.)
        with nullcontext() if mode() is Mode.COMPILING else self.lock:
            return self._run(params, buffers, function, *args, **kwargs)

    def _run(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        for (copied, _), training in zip(self._modes, self.training, strict=True):
            if copied.training != training:  # it takes a while to set
                copied.training = training
        own, own_buffers = self.read(), self.read_buffers()
        try:
            self.write(params)
            self.write_buffers({name: buffer.clone() for name, buffer in buffers.items()})
            return function(*args, **kwargs), self.read_buffers()
        finally:
            self.write({name: own[name] for name in params})
            self.write_buffers(own_buffers)


def replaced(name: str, what: str) -> InvalidInputError:
    """Return the error for a submodule that was replaced, where something runs again without it.

    Args:
        name: of the submodule.
        what: what runs again.
    """
    return InvalidInputError(
        f"the submodule {name!r} of loop.model was added, removed or replaced inside the loop, and "
        f"{what} runs again in a backward pass with the modules that the loop began with: the "
        "derivative would be that of another model. Build the model with all its submodules "
        "before the loop, and choose between them in its forward pass; or hand the other module "
        "over as an argument of the function that runs again"
    )


def _as_they_stand(
    modules: Sequence[tuple[str, nn.Module]],
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and buffers as listed, or as they stand in the modules' tables.

    A module may register its parameters anew whenever its modules are listed (adapters do); what
    was listed is then not in it any more.
    """
    kinds = (torch_private.parameter_table, torch_private.buffer_table)
    standing: set[int] = set()
    for table in kinds:
        for _, module in modules:
            standing.update(map(id, table(module).values()))
    if standing.issuperset(map(id, params.values())) and standing.issuperset(
        map(id, buffers.values())
    ):
        return params, buffers
    found = [by_name(standing_in(modules, table)) for table in kinds]
    return {n: found[0][n] for n in params}, {n: found[1][n] for n in buffers}


def _has(module: nn.Module, flag: str) -> bool:
    """True if an attribute that a module keeps of its own, or in its class, is True."""
    # Not getattr: of what it does not find a module makes an error, which takes its time.
    return vars(module).get(flag) is True or getattr(type(module), flag, None) is True


def look_up_densely(modules: Iterable[nn.Module]) -> None:
    """Let embeddings among the modules of a copy send dense gradients back to their tables.

    Few operations have a derivative for a sparse one; PyTorch cannot even add a dense one to it in
    a gradient that is to be differentiated, as a penalty on the table asks for.
    """
    for module in modules:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            vars(module)["sparse"] = False


def keep_running_statistics(view: ModuleView) -> None:
    """Let batch and instance norms hold copies of the running statistics that they computed with.

    The graph of a forward reads those in its backward pass, and norms write in place without saying
    so; the user may reset or load the statistics too.
    """
    for module in view.modules:
        if (
            _has(module, "track_running_stats")
            and torch_private.buffer_table(module).get("running_mean") is not None
        ):
            module.register_forward_hook(_copy_running_statistics)


def _copy_running_statistics(module: nn.Module, _: object, __: object) -> None:
    table = torch_private.buffer_table(module)
    for name in ("running_mean", "running_var"):
        statistic = table[name]
        if statistic is not None:
            table[name] = statistic.clone()
