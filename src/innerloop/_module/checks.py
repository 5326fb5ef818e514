"""Checks of a module and of the parameters given for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from innerloop._utils import torch_private
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError, NotDifferentiableError


class refusing_recomputation(torch_private.refusing_saved_tensors_hooks):  # noqa: N801 (as above)
    """Refuse saved-tensor hooks that begin inside.

    A checkpointed forward would be recomputed later, when a module has other weights. Hooks around
    the whole loop stay: checkpointing of a layer that has the loop inside repeats all of it.
    """

    _REFUSED = "innerloop refuses saved tensor hooks here"

    def __init__(self) -> None:
        super().__init__(self._REFUSED)

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        _, error, _ = raised
        if isinstance(error, RuntimeError) and self._REFUSED in str(error):
            raise NotDifferentiableError(
                "hooks on saved tensors begin inside a function of parameters, as those of "
                "activation checkpointing do: what they compute again they would compute with "
                "other weights. Write torch.utils.checkpoint.checkpoint inside the loop, which "
                "uses none there. (Write save_on_cpu around the whole loop, or "
                'strategy=innerloop.Checkpointed(offload="cpu").)'
            ) from error


def versions_of(params: Mapping[str, Tensor]) -> list[int]:
    """Count for each tensor how often it has been written in place."""
    if mode() is Mode.EAGER:
        with suppress(RuntimeError):  # one made under inference_mode has no count
            return torch_private.versions(params.values())
    return [
        0 if x.is_inference() else torch_private.version(x)
        for x in map(torch_private.innermost, params.values())
    ]


class refusing_writes:  # noqa: N801 (used like a function; a step enters it every time)
    """Raise if one of ``params`` is written in place inside the block."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._params = params
        self._before: list[int] | None = None

    def __enter__(self) -> None:
        if mode() is not Mode.COMPILING:
            self._before = versions_of(self._params)

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None or self._before is None:
            return
        after = versions_of(self._params)
        if after == self._before:
            return
        counts = zip(self._params, self._before, after, strict=True)
        name = next(name for name, was, now in counts if was != now)
        raise InvalidInputError(
            f"the loss writes the parameter {name!r} in place (a forward pass that clips its "
            "weight under no_grad or .data): that is not a function of the parameters, and "
            "the derivative would take it for a constant added. Write it in the forward pass "
            "out of place: torch.clamp(self.weight, -1, 1)"
        )


def check_not_inference(what: str, tensor: Tensor) -> None:
    """Raise if a tensor was made under ``torch.inference_mode``."""
    if mode() is not Mode.COMPILING and tensor.is_inference():
        raise InvalidInputError(
            f"{what} was made under torch.inference_mode, and has no gradient: write "
            "tensor.clone() outside of that mode, or make it under torch.no_grad"
        )


def check_module(model: object) -> None:
    """Raise unless ``model`` is a module that can be viewed at other parameters."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInputError(
            "a torch.jit.ScriptModule has no second derivative here: pass the Python module it "
            "was made from"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InvalidInputError(
            "a DistributedDataParallel module synchronises gradients by hooks that an inner loop "
            "does not run: pass model.module, "
            "and average the outer gradients yourself"
        )
    _refuse_gathering(model)


def _refuse_gathering(model: nn.Module) -> None:
    """Raise if a module gathers sharded parameters in hooks of its own."""
    module: Any = sys.modules.get("torch.distributed.fsdp")
    if module is not None and isinstance(
        model, (module.FSDPModule, module.FullyShardedDataParallel)
    ):
        raise InvalidInputError(
            f"{type(model).__name__} was sharded by fully_shard (or FullyShardedDataParallel), "
            "which gathers its parameters in hooks that belong to the module itself: a loop's copy "
            "would compute with the parts. Keep the parameters as DTensors "
            "(torch.distributed.tensor.distribute_tensor) and gather them in the loss of an "
            "innerloop.Problem, {name: p.full_tensor() for name, p in params.items()}"
        )


class LateHooks:
    """Refuses hooks that come after a loop has begun, on its parameters and modules.

    Args:
        modules: the modules of the loop's copy.
        instead: what to write.
    """

    def __init__(self, modules: Iterable[nn.Module], instead: str) -> None:
        self._modules = list(modules)
        self._instead = instead
        self._seen = torch_private.hooks_so_far()

    def check(self, params: Iterable[tuple[object, Tensor]]) -> None:
        """Raise if a parameter, or a module of the model, has a hook that came later.

        Looks only after new hooks were registered somewhere.
        """
        now = torch_private.hooks_so_far()
        if now == self._seen:
            return
        for name, p in params:
            if torch_private.gradient_hooks(p):
                raise InvalidInputError(
                    f"the parameter {name!r} of the loop's model was given a hook (register_hook) "
                    f"while the loop runs, which would act on other gradients. {self._instead}"
                )
        for module in self._modules:
            if torch_private.backward_hooks(module) and not torch_private.is_wrapped(module):
                raise InvalidInputError(
                    f"a backward hook was registered on a {type(module).__name__} of the loop's "
                    "model while the loop runs: it would act a second time in the outer backward "
                    f"pass. {self._instead}"
                )
        self._seen = now


_CLIPPING = "torch.nn.utils.clip_grad"


def refuse_clipping() -> None:
    """Raise if ``torch.nn.utils.clip_grad_norm_`` or its kind is at work on what is asked for."""
    frame = sys._getframe(1)  # noqa: SLF001
    for _ in range(12):
        name = frame.f_code.co_name
        if name.startswith("clip_grad") and frame.f_globals.get("__name__") == _CLIPPING:
            raise InvalidInputError(
                f"torch.nn.utils.{name} was given parameters of a differentiable "
                "loop, which have no .grad: it would clip nothing. Clip in the step: "
                "loop.step(loss, grad_callback=innerloop.optim.clip_by_global_norm(1.0)) "
                "(clip_by_value for clip_grad_value_; innerloop.higher: diffopt.step(loss, "
                "grad_callback=...))"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back


def check_names(params: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise unless each name is a parameter among ``own`` and has its shape."""
    for name, tensor in params.items():
        if name not in own:
            raise InvalidInputError(
                f"params has {name!r}, which is not a parameter of the model; it has "
                f"{list(own)[:8]}"
            )
        if tensor.shape != own[name].shape:
            raise InvalidInputError(
                f"params[{name!r}] has shape {tuple(tensor.shape)}, the model's parameter "
                f"{tuple(own[name].shape)}"
            )


def named_parameters(model: nn.Module | Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """List the named parameters of a module, or of several with their key in front.

    A shared tensor is listed once.
    """
    return _named(model, nn.Module.named_parameters)


def named_buffers(model: nn.Module | Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """List the named buffers of a module, or of several with their key in front."""
    return _named(model, nn.Module.named_buffers)


def _named(
    model: nn.Module | Mapping[str, nn.Module], listing: Callable[[nn.Module], Any]
) -> list[tuple[str, Any]]:
    if isinstance(model, nn.Module):
        return [(torch_private.uncompiled_name(name), tensor) for name, tensor in listing(model)]
    seen: dict[int, tuple[str, Any]] = {}
    for key, module in model.items():
        for name, tensor in _named(module, listing):
            seen.setdefault(id(tensor), (f"{key}.{name}", tensor))
    return list(seen.values())


def by_name(listed: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors by name; raise if two have the same one."""
    named: dict[str, Tensor] = {}
    for name, tensor in listed:
        if named.setdefault(name, tensor) is not tensor:
            raise InvalidInputError(
                f"two tensors of the model are called {name!r}, and one of them would never be "
                "trained: give the modules other keys, without a dot"
            )
    return named


def standing_in(
    modules: Iterable[tuple[str, nn.Module]], table: Callable[[nn.Module], Mapping[str, Any]]
) -> list[tuple[str, Tensor]]:
    """List the tensors in one kind of table of `in_tables`, a shared one once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in modules:
        for key, tensor in table(module).items():
            if tensor is not None:
                found.setdefault(id(tensor), (prefix + key, tensor))
    return list(found.values())


def in_tables(model: nn.Module | Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """List the modules of a tree, each once, without a method that a user's class may override."""
    seen: set[int] = set()
    if isinstance(model, nn.Module):
        stack = [("", model)]
    else:
        stack = [(f"{key}.", module) for key, module in reversed(list(model.items()))]
    while stack:
        prefix, found = stack.pop()
        module = torch_private.uncompiled(found)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield prefix, module
        children = torch_private.module_table(module)
        if children:
            below = [(f"{prefix}{k}.", m) for k, m in children.items() if m is not None]
            stack.extend(reversed(below))
