"""``OuterState``: the checkpoint of an outer loop."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import random as python_random
import sys
import zipfile
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from innerloop._utils.arguments import shown
from innerloop._utils.whole_file import whole_file
from innerloop.errors import InvalidInputError

FORMAT = "innerloop.OuterState"
VERSION = 1
LIKE_PARAMETER = frozenset(
    "exp_avg exp_avg_sq exp_inf max_exp_avg_sq momentum_buffer square_avg grad_avg sum acc_delta "
    "ax mu prev step_size".split()
)
"""Entries of the optimizers' states that have the shape of their parameter."""


@runtime_checkable
class Stateful(Protocol):
    """Anything that has a state: a module, an optimizer, a scheduler, a sampler of data."""

    def state_dict(self) -> Mapping[str, object]:
        """Return what `load_state_dict` needs."""

    def load_state_dict(self, state_dict: Any) -> object:
        """Continue from a state."""


Part: TypeAlias = "Stateful | Tensor | Mapping[str, Part] | Sequence[Part] | None"
"""A part of a checkpoint: stateful objects and tensors, alone or in dicts and lists."""


class OuterState:
    """Everything that an outer loop needs to go on bit for bit, and one file that holds it.

    It keeps references: `save` writes the objects as they are then, and `load` changes the same
    objects in place.

    Args:
        model: the outer variables: a module, a tensor, or a dict or list of those.
        optimizer: the outer optimizer, or a dict or list of several.
        scheduler: its learning rate scheduler; or anything else with ``state_dict`` and
            ``load_state_dict`` (a sampler of data, environments), or a dict or list of those.
        random: True keeps the state of torch's global generators (CPU and CUDA), of Python's
            ``random`` and of ``numpy.random``; a `torch.Generator` or a list of them is kept
            beside these; False keeps none.
        counters: a dict of numbers, strings, tensors, and lists and dicts of those (the iteration,
            the history of losses). It is changed in place by `load`.

    Example:
        >>> import tempfile, torch, innerloop
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> counters = {"iteration": 3}
        >>> state = innerloop.OuterState(model=model, optimizer=optimizer, counters=counters)
        >>> path = tempfile.mkdtemp() + "/outer.pt"
        >>> state.save(path)
        >>> first = torch.rand(()), counters.update(iteration=9)
        >>> state.load(path)
        >>> counters["iteration"], bool(torch.rand(()) == first[0])
        (3, True)
    """

    def __init__(
        self,
        *,
        model: Part = None,
        optimizer: Part = None,
        scheduler: Part = None,
        random: bool | torch.Generator | Sequence[torch.Generator] = True,
        counters: MutableMapping[str, Any] | None = None,
    ) -> None:
        if counters is not None and not isinstance(counters, MutableMapping):
            raise InvalidInputError(
                f"counters is a {type(counters).__name__}, which load() cannot change: pass a "
                "dict, for example counters={'iteration': 0}"
            )
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.counters: MutableMapping[str, Any] = {} if counters is None else counters
        if isinstance(random, torch.Generator):
            random = [random]
        if not isinstance(random, (bool, list, tuple)):
            raise InvalidInputError(
                f"random is {shown(random)}: write True, False, or a list of torch.Generator"
            )
        self._global = bool(random) or not isinstance(random, bool)
        self._generators = [] if isinstance(random, bool) else list(random)
        for name, part in self._parts().items():
            _check_part(name, part)
        for generator in self._generators:
            if not isinstance(generator, torch.Generator):
                raise InvalidInputError(
                    f"random holds a {type(generator).__name__}: write True, False, or a list of "
                    "torch.Generator"
                )

    def __repr__(self) -> str:
        parts = [f"{name}={type(part).__name__}" for name, part in self._parts().items() if part]
        return f"OuterState({', '.join([*parts, f'counters={dict(self.counters)!r}'])})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file ``path``, all of it or nothing.

        The state goes to a temporary file in the same folder, which is flushed to the disk and then
        takes the place of ``path``: a process that is killed leaves the file of the last `save`.

        Raises:
            InvalidInputError: a part holds objects of a class that `load` would have to trust
                (``torch.load`` with ``weights_only=True`` refuses them).
            OSError: the folder cannot be written. The file that was there before is kept.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, _check_safe) as file:
            try:
                torch.save(self._read(), file)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise InvalidInputError(
                    f"the state cannot be written to a file ({error}): keep tensors, numbers, "
                    "strings, lists and dicts in it"
                ) from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from the file ``path``, which `save` wrote.

        Raises:
            InvalidInputError: the file is missing, damaged (a checksum does not fit), of another
                kind, or belongs to other objects (a part, a name or a shape differs). Nothing is
                changed then: neither the objects, nor the counters, nor the random state.
        """
        found = _read_file(Path(path))
        parts = self._parts()
        if sorted(found["parts"]) != sorted(name for name in parts if parts[name] is not None):
            raise InvalidInputError(
                f"{path} was saved with {_listed(found['parts'])}, and this OuterState has "
                f"{_listed([n for n in parts if parts[n] is not None])}: make it from the same "
                "parts"
            )
        if len(found["generators"]) != len(self._generators):
            raise InvalidInputError(
                f"{path} was saved with {len(found['generators'])} generators, and this OuterState "
                f"has {len(self._generators)}: pass the same number as random="
            )
        if self._global and found["random"] is None:
            raise InvalidInputError(
                f"{path} was saved with random=False, and holds no random state: pass random=False"
            )
        before = copy.deepcopy(self._read())
        try:
            self._write(found)
        except BaseException as error:
            self._write(before)
            if isinstance(error, InvalidInputError) or not isinstance(error, Exception):
                raise
            raise InvalidInputError(
                f"{path} does not fit the objects of this OuterState: {error}"
            ) from error

    def _parts(self) -> dict[str, Part]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def _read(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "parts": {n: _state_of(part) for n, part in self._parts().items() if part is not None},
            "counters": dict(self.counters),
            "random": _global_random_state() if self._global else None,
            "generators": [generator.get_state() for generator in self._generators],
        }

    def _write(self, state: Mapping[str, Any]) -> None:
        for name, part in self._parts().items():
            if part is not None:
                _restore(name, part, state["parts"][name])
        self.counters.clear()
        self.counters.update(state["counters"])
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved)
        if self._global:
            _restore_global_random_state(state["random"])


def _check_safe(path: Path) -> None:
    """Raise if `OuterState.load` would refuse the file."""
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unsafe:
        raise InvalidInputError(
            f"the state holds objects of {', '.join(sorted(unsafe))}, which load() would "
            "refuse, since a file that names classes can run code: keep tensors, numbers, "
            "strings, lists and dicts in it, or register the class with "
            "torch.serialization.add_safe_globals"
        )


def _check_part(where: str, part: object) -> None:
    if part is None or isinstance(part, (Tensor, Stateful)):
        return
    if isinstance(part, Mapping):
        for key, value in part.items():
            _check_part(f"{where}[{key!r}]", value)
    elif isinstance(part, Sequence) and not isinstance(part, str):
        for i, value in enumerate(part):
            _check_part(f"{where}[{i}]", value)
    else:
        raise InvalidInputError(
            f"{where} is a {type(part).__name__}, which has no state_dict and load_state_dict: "
            "pass modules, optimizers or tensors, alone or in a dict; numbers belong in counters"
        )


def _state_of(part: Part) -> Any:
    if isinstance(part, Tensor):
        return part.detach()
    if isinstance(part, Stateful):
        return part.state_dict()
    if isinstance(part, Mapping):
        return {key: _state_of(value) for key, value in part.items()}
    return None if part is None else [_state_of(value) for value in part]


def _restore(where: str, part: Part, state: Any) -> None:
    if isinstance(part, Tensor):
        _copy(where, part, state)
    elif isinstance(part, torch.optim.Optimizer):
        _check_optimizer(where, part, state)
        # The optimizer keeps what it is given, and would then write into it.
        part.load_state_dict(copy.deepcopy(state))
    elif isinstance(part, Stateful):
        part.load_state_dict(copy.deepcopy(state))
    elif isinstance(part, Mapping):
        if not isinstance(state, Mapping) or list(state) != list(part):
            raise InvalidInputError(
                f"{where} was saved with {_listed(state)}, and now has {_listed(part)}"
            )
        for key, value in part.items():
            _restore(f"{where}[{key!r}]", value, state[key])
    elif part is not None:
        if not isinstance(state, list) or len(state) != len(part):
            raise InvalidInputError(f"{where} has {len(part)} parts, other than in the file")
        for i, value in enumerate(part):
            _restore(f"{where}[{i}]", value, state[i])


def _copy(where: str, tensor: Tensor, saved: object) -> None:
    if not isinstance(saved, Tensor) or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
        what = f"{tuple(saved.shape)}, {saved.dtype}" if isinstance(saved, Tensor) else saved
        raise InvalidInputError(
            f"{where} has shape {tuple(tensor.shape)}, {tensor.dtype}; in the file it is {what}"
        )
    with torch.no_grad():
        tensor.copy_(saved)


def _check_optimizer(
    where: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Raise where torch's ``load_state_dict`` would accept averages of another shape."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, p in zip(numbers, own, strict=False):
        for key, value in state["state"].get(number, {}).items():
            if key in LIKE_PARAMETER and isinstance(value, Tensor) and value.shape != p.shape:
                raise InvalidInputError(
                    f"{where} has {key!r} of shape {tuple(value.shape)} in the file for a "
                    f"parameter of shape {tuple(p.shape)}: the optimizer trains other parameters"
                )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"the checksum of {broken} does not fit")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InvalidInputError(
            f"there is no file {path}: nothing was saved there (a run that starts anew needs no "
            "load)"
        ) from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error}") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, NotImplementedError) as error:
        raise InvalidInputError(
            f"{path} is damaged, or was not written by OuterState.save ({error}): start from an "
            "older file"
        ) from error
    except pickle.UnpicklingError as error:
        raise InvalidInputError(
            f"{path} was not written by OuterState.save: it holds objects that could run code"
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InvalidInputError(
            f"{path} was not written by OuterState.save: it holds a {type(found).__name__}; a "
            "state_dict is read with torch.load"
        )
    if found["version"] != VERSION:
        raise InvalidInputError(
            f"{path} has version {found['version']} of the format, and this innerloop reads "
            f"version {VERSION}: use the release that wrote it"
        )
    return found


def _global_random_state() -> dict[str, Any]:
    version, words, gauss = python_random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [version, torch.tensor(words), gauss],
    }
    if numpy := sys.modules.get("numpy"):
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        words = torch.tensor(keys.astype("int64"))
        state["numpy"] = [str(name), words, int(position), int(has_gauss), float(cached)]
    return state


def _restore_global_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    python_random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in state:
        numpy = importlib.import_module("numpy")
        name, words, *rest = state["numpy"]
        numpy.random.set_state((name, words.numpy().astype("uint32"), *rest))


def _listed(names: object) -> str:
    return (
        ", ".join(map(str, names)) or "nothing" if isinstance(names, (Mapping, list)) else "others"
    )
