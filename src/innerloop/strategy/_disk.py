"""A folder in which a loop keeps its states, and from which it goes on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from innerloop.errors import InvalidInputError


@dataclasses.dataclass(frozen=True)
class Disk:
    """A named folder for ``Checkpointed(offload=...)``: a loop that was killed goes on from there.

    The states wait in the folder, as with ``offload="disk"``, and stay there when the process ends.
    The same call in a new process, with the same arguments, goes on from the newest state, in the
    backward pass too, and gives the same results bit for bit (on the same machine, with the same
    number of threads). When the backward pass is through, the folder is emptied, and the next call
    starts anew. Without a gradient (under ``torch.no_grad``) that is after the last step.

    Each file is written whole or not at all, flushed to the disk, and carries a checksum. A file
    that is damaged is computed again, with a warning. Files of another loop are refused: other
    parameters, hyper-parameters, batches, settings, code of the loss, version of PyTorch, or, if
    the loop draws random numbers, another seed. So is a folder that another process is using.

    The backward pass goes on where it was if the outer loss asks for the same derivative (the same
    cotangents, bit for bit); else it starts over from the states that are there.

    Args:
        folder: its path; it is made if it does not exist. Other files in it are left alone.

    Example:
        The first call is interrupted in step 5 of 8; the second one takes three steps.

        >>> import tempfile, torch, innerloop
        >>> taken = []
        >>> def loss(params, hyper, batch):
        ...     return (params["w"] - batch) ** 2 / 2
        >>> def run(progress):
        ...     return innerloop.unroll(
        ...         innerloop.Problem(loss, innerloop.optim.sgd(lr=0.5)),
        ...         {"w": torch.tensor(256.0, requires_grad=True)},
        ...         [torch.tensor(0.0)] * 8,
        ...         strategy=innerloop.Checkpointed(offload=innerloop.strategy.Disk(folder)),
        ...         progress=progress,
        ...     )
        >>> def interrupt(phase, done, total):
        ...     if done == 5:
        ...         raise KeyboardInterrupt
        >>> folder = tempfile.mkdtemp()
        >>> try:
        ...     run(interrupt)
        ... except KeyboardInterrupt:
        ...     traj = run(lambda phase, done, total: taken.append(done))
        >>> taken, traj.params["w"].item()
        ([4, 5, 6, 7, 8], 1.0)
    """

    folder: str | os.PathLike[str]

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)) or not str(self.folder):
            raise InvalidInputError(
                f'Disk({self.folder!r}): write the path of a folder, Disk("run1") for example'
            )

    def __repr__(self) -> str:
        return f"Disk({str(self.folder)!r})"

    @property
    def path(self) -> Path:
        """Return the folder as a path."""
        return Path(self.folder).expanduser()
