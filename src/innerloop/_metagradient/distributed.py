"""The tasks of `map_tasks` on several processes: shares, and one sum over all."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from innerloop._utils import tree
from innerloop.errors import InvalidInputError, ProcessGroupError

_PATIENCE = dt.timedelta(hours=12)
"""How long a process waits for others that live and compute. One that ends is noticed at once."""


class Run:
    """One call of `map_tasks` on a group of processes.

    Args:
        group: the process group.
        count: the number of tasks.

    Attributes:
        share: the tasks of this process: the first processes take one more where it is not even.
    """

    def __init__(self, group: Any, count: int) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidInputError(
                "group= needs torch.distributed: start the program by torchrun and call "
                'torch.distributed.init_process_group("gloo") first'
            )
        if not isinstance(group, dist.ProcessGroup):
            raise InvalidInputError(
                f"group is {type(group).__name__}: write torch.distributed.group.WORLD, or what "
                "torch.distributed.new_group returns"
            )
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._rank = group, rank
        self._device = (
            torch.device("cuda", torch.cuda.current_device())
            if dist.get_backend(group) == "nccl"
            else torch.device("cpu")
        )
        each, rest = divmod(count, size)
        begin = rank * each + min(rank, rest)
        self.share = range(begin, begin + each + (rank < rest))

    def first(self, number: int) -> int:
        """Return the number of the first process; that every process passes one is checked."""
        given = torch.tensor([number if self._rank == 0 else 0], device=self._device)
        self._sum(given)
        return int(given)

    @contextmanager
    def shared_fate(self) -> Iterator[None]:
        """Raise on every process if the block raises on one, which then raises its own error."""
        failed: BaseException | None = None
        try:
            yield
        except Exception as error:
            failed = error
        flags = torch.zeros(
            dist.get_world_size(self._group), dtype=torch.int64, device=self._device
        )
        flags[self._rank] = failed is not None
        try:
            self._sum(flags)
        except ProcessGroupError:
            if failed is None:
                raise
        if failed is not None:
            raise failed
        if bool(flags.any()):
            others = ", ".join(str(i) for i in flags.nonzero().flatten().tolist())
            raise ProcessGroupError(
                f"fn raised an error on process {others} of the group, so there is no result: its "
                "own output says which"
            )

    def reduced(self, sums: Any, count: int, *, mean: bool) -> Any:
        """Return the sums of all processes, or their means over ``count`` tasks."""
        leaves = tree.leaves(sums)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        real = [
            torch.view_as_real(leaves[i]) if leaves[i].is_complex() else leaves[i] for i in places
        ]
        kinds = {x.dtype for x in real if x.is_floating_point()}
        single = bool(kinds) and kinds <= {torch.float32, torch.bfloat16, torch.float16}
        wide = (
            torch.float32 if single and all(x.is_floating_point() for x in real) else torch.float64
        )
        flat = torch.cat([x.reshape(-1).to(self._device, wide) for x in real])
        self._sum(flat)
        parts = flat.split([x.numel() for x in real])
        for i, x, part in zip(places, real, parts, strict=True):
            value = part.reshape(x.shape).to(x.device)
            if leaves[i].is_complex():
                value = torch.view_as_complex(value)
            if mean:
                value = value / count
                leaves[i] = value.to(leaves[i].dtype) if _keeps_mean(leaves[i]) else value
            else:
                leaves[i] = value.to(leaves[i].dtype)
        return tree.with_leaves(sums, leaves)

    def _sum(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all processes."""
        try:
            work = dist.all_reduce(tensor, group=self._group, async_op=True)
            assert work is not None
            work.wait(_PATIENCE) if self._device.type == "cpu" else work.wait()
        except RuntimeError as error:
            raise ProcessGroupError(
                "another process of the group has ended, or cannot be reached, so there is no "
                f"result. PyTorch says: {error}"
            ) from error


def _keeps_mean(x: Tensor) -> bool:
    """True if a mean of such numbers has their dtype."""
    return x.is_floating_point() or x.is_complex()
