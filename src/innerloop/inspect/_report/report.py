"""``report``: what was found about a training, as one page for a browser."""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from innerloop._track.loop import TrackedLoop
from innerloop._trajectory import Trajectory
from innerloop._utils.progress import Report as Progress
from innerloop._utils.progress import closing, reporter
from innerloop.errors import InvalidInputError, MissingExtraError
from innerloop.inspect._attribution import Attribution
from innerloop.inspect._diagnose import Diagnosis
from innerloop.inspect._report import of_attribution, of_diagnosis, of_loop
from innerloop.inspect._report.page import Section, grid, page, words

Reportable = Trajectory | TrackedLoop | Diagnosis | Attribution
"""What a report can be made of."""


class ReportPage(NamedTuple):
    """A report that was written.

    Attributes:
        file: the page.
        results: what its pictures show, by name: named tuples of tensors, each with ``.plot()``.
        left_out: what could not be looked at, and why.
    """

    file: Path
    results: dict[str, Any]
    left_out: dict[str, str]


def report(
    what: Reportable | Sequence[Reportable],
    file: str | Path = "innerloop-report.html",
    *,
    outer: Callable[[Trajectory, Any], Any] | None = None,
    title: str = "",
    directions: int = 3,
    probes: int = 4,
    images: Tensor | None = None,
    labels: Sequence[str] | None = None,
    query_images: Tensor | None = None,
    query_labels: Sequence[str] | None = None,
    progress: bool | Progress = False,
) -> ReportPage:
    """Write a page for a browser about a training, a diagnosis or an attribution.

    The page is one file that fetches nothing: verdicts in words, then pictures, then costs,
    settings and versions. It follows the light or dark setting of the browser, and is readable on a
    phone.

    Args:
        what: a trajectory of `innerloop.unroll`, a loop of `innerloop.track`, what
            `innerloop.diagnose` or `innerloop.attribute` returned, or a list of these.
        file: where the page is written.
        outer: ``outer(traj, hyper)``, the outer loss of a trajectory; None leaves out what depends
            on it: verdict, influence and paths.
        title: the heading.
        directions: how many of the strongest directions of a trajectory are looked for; 0: none.
        probes: random vectors for each block of the Jacobian.
        images: of an attribution, one for each training example, ``[N, H, W]`` or
            ``[N, 3, H, W]``.
        labels: a line for each training example.
        query_images, query_labels: the same for the outcomes.
        progress: True for a bar, or a function ``progress(phase, done, total)``.

    Returns:
        A `ReportPage`, with everything that the pictures show.

    Raises:
        InvalidInputError: ``what`` is none of these, or images and labels do not fit.
        MissingExtraError: matplotlib is not installed (``pip install 'innerloop[plot]'``).

    Cost:
        Of a trajectory about ten meta-gradients and, for the directions, 20 pairs of products. Of
        an attribution whose `Attribution.check` was not called, that check: 16 trainings.

    Example:
        >>> import tempfile, torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: params["w"] ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> start = {"w": torch.tensor(8.0, requires_grad=True)}
        >>> traj = innerloop.unroll(problem, start, None, steps=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = innerloop.inspect.report(
        ...         traj, folder + "/report.html", outer=lambda traj, hyper: traj.params["w"]
        ...     )
        ...     written.file.name, written.results["influence"].whole.tolist()
        ('report.html', [0.125, 0.25, 0.5, 1.0])
    """
    known = (Trajectory, TrackedLoop, Diagnosis, Attribution)
    # A Diagnosis is a tuple, too.
    parts: list[Reportable] = [what] if isinstance(what, known) else _parts(what)
    for part in parts:
        if not isinstance(part, known):
            raise InvalidInputError(
                f"a report of {type(part).__name__} is not known: pass a trajectory, a tracked "
                "loop, what diagnose or attribute returned, or a list of these"
            )
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "plot", "innerloop.inspect.report") from error
    told = reporter(progress)
    sections: list[Section] = []
    results: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    judged = any(isinstance(part, Diagnosis) for part in parts)
    with closing(told):
        for part in parts:
            if isinstance(part, Diagnosis):
                sections += of_diagnosis.sections(part)
                results["diagnosis"] = part
            elif isinstance(part, Attribution):
                shown = of_attribution.Shown(images, labels, query_images, query_labels)
                sections += of_attribution.sections(part, shown)
                results["attribution"] = part
            else:
                found = of_loop.look(
                    part, outer, directions=directions, probes=probes, judge=not judged, told=told
                )
                sections += of_loop.sections(found)
                results |= found.results
                left_out |= found.left_out
    if left_out:
        rows = [[name, reason] for name, reason in left_out.items()]
        body = "".join(words(f"{name}: {reason}", soft=True) for name, reason in rows)
        sections.append(Section("Left out", body))
    sections.append(versions(matplotlib=mpl.__version__))
    target = Path(file)
    target.write_text(page(title or "A look inside a training", sections), encoding="utf-8")
    return ReportPage(target, results, left_out)


def _parts(what: object) -> list[Any]:
    return list(what) if isinstance(what, (list, tuple)) else [what]


def versions(**more: str) -> Section:
    """Return the section that says by what the page was made."""
    rows = [
        ["made on", dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")],
        ["innerloop", _version("innerloop")],
        ["Python", platform.python_version()],
        ["torch", torch.__version__],
        *([name, number] for name, number in more.items()),
        ["machine", f"{platform.system()}, {platform.machine()}"],
        ["threads of torch", str(torch.get_num_threads())],
    ]
    return Section("Versions", grid(["", ""], rows))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"
