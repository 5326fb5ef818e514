"""The command line: the walk-through, a look at a script of one's own, ``doctor``, ``rl``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from innerloop.errors import InnerLoopError, InvalidInputError, MissingExtraError
from innerloop.walkthrough import Walkthrough, run, to_text, write_picture, write_report

OK, DISAGREES, FAILED = 0, 1, 2
"""Exit codes: done; a check failed; it could not run, or something is missing or unwritable."""
PICTURE = Path("innerloop-walkthrough.png")
REPORT = Path("innerloop-walkthrough.html")
PAGE = "report.html"
LEAST_CORRELATION = 0.5
"""Below this rank correlation with real retraining an attribution is worthless."""
LARGE = 10_000
"""Tensors with more numbers than that are told by shape and norm in JSON."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: What stands behind ``innerloop`` on the command line; None reads it from there.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _print_what_the_terminal_can()
    if getattr(options, "script", None) is not None:
        return on_a_script(options)
    if options.command == "doctor":
        return doctor(options.device, markdown=options.markdown)
    if options.command == "bench":
        return bench(rest)
    if options.command == "rl":
        return reinforcement_learning(options)
    if options.report is not None:
        return walkthrough_report(options.report)
    return walkthrough(picture=options.picture, draw=not options.no_picture)


def walkthrough(picture: Path | None = None, *, draw: bool = True) -> int:
    """Print the tables of the walk-through and write its picture.

    Args:
        picture: The file for the picture; None stands for `PICTURE`, and then a missing matplotlib
            is no error.
        draw: False draws no picture at all.
    """
    result = run()
    print(to_text(result))
    drawn = _write_picture(result, picture) if draw else OK
    return drawn if result.agrees else DISAGREES


def walkthrough_report(file: Path) -> int:
    """Print the tables of the walk-through, and write them and more as a page for a browser."""
    result = run()
    print(to_text(result))
    try:
        write_report(result, file)
    except (MissingExtraError, OSError) as error:
        print(f"\nNo report: {file} cannot be written: {error}", file=sys.stderr)
        return FAILED
    print(f"\nReport: {file}")
    return OK if result.agrees else DISAGREES


# -- a script of one's own -------------------------------------------------------------------------


def on_a_script(options: argparse.Namespace) -> int:
    """Run ``inspect``, ``check``, ``attribute`` or ``doctor`` on what a user's function returns.

    Returns:
        `DISAGREES` if a check failed, `FAILED` if it could not run, else `OK`.
    """
    command: str = options.command
    try:
        given = arguments_of(options.script)
        if command == "doctor":
            return _examine(given)
        page = Path(options.out or f"innerloop-{command}") / PAGE
        if page.exists() and not options.force:
            raise InvalidInputError(
                f"{page} is there already: write --force to replace it, or --out another folder"
            )
        with Progress(command) as progress:
            result = _ON_SCRIPTS[command](given, progress)
            written = _written(page, result.write, asked=options.out is not None)
    except (InnerLoopError, OSError) as error:
        print(f"innerloop {command}: {error}", file=sys.stderr)
        return FAILED
    print(json.dumps(plain(result.found), indent=1) if options.json else result.text())
    # With --json standard output is for the machine.
    print(written, file=sys.stderr if options.json else sys.stdout)
    return OK if result.good else DISAGREES


def arguments_of(script: str) -> dict[str, Any]:
    """Return what the function that ``script`` names returns, ``"train.py:problem"`` for example.

    Raises:
        InvalidInputError: there is no such function, or it returns no dict.
    """
    file, _, name = script.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise InvalidInputError(
            f"{script!r} names no function in a file: write script.py:function, a file that exists "
            "and a function in it"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InvalidInputError(f"{path} cannot be imported: write the name of a Python file")
    module = importlib.util.module_from_spec(spec)
    # As for a script that is run: what lies beside it can be imported.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            raise InvalidInputError(f"{path} has no function {name!r}: write one of its functions")
        found = function()
    except InnerLoopError:
        raise
    except Exception as error:
        raise InvalidInputError(
            f"{script} stopped with {type(error).__name__}: {error}: it must run by itself and "
            "return a dict"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    if isinstance(found, tuple) and len(found) == 2:
        found = {"model": found[0], "example": found[1]}
    if not isinstance(found, Mapping):
        raise InvalidInputError(
            f"{script} returned {type(found).__name__}: return a dict with the arguments of the "
            "call"
        )
    return dict(found)


class Progress:
    """Says on standard error what is going on, once it takes more than two seconds.

    Args:
        command: what is running.
    """

    def __init__(self, command: str) -> None:
        self._command, self._phase = command, "running"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Take note of how far it is."""
        self._phase = f"{phase} {done}" + ("" if total is None else f" of {total}")

    def __enter__(self) -> Progress:
        self._begin = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _tell(self) -> None:
        wait = 2.0
        terminal = sys.stderr.isatty()
        told = False
        while not self._done.wait(wait):
            seconds = time.monotonic() - self._begin
            line = f"innerloop {self._command}: {self._phase}, {seconds:.0f} s"
            print(
                f"\r{line}  " if terminal else line, end="" if terminal else "\n", file=sys.stderr
            )
            sys.stderr.flush()
            told = True
            # A log gets fewer and fewer lines.
            wait = 1.0 if terminal else 2 * wait
        if told and terminal:
            print(file=sys.stderr)


class Result(NamedTuple):
    """What a command has found.

    Attributes:
        found: all of it.
        text: it in words, asked for after the page was written.
        good: True if no check failed.
        write: writes the page; None where there is none.
    """

    found: object
    text: Callable[[], str]
    good: bool
    write: Callable[[Path], object] | None


def _inspect(given: dict[str, Any], progress: Progress) -> Result:
    from innerloop import Checkpointed, inspect, unroll
    from innerloop._utils import tree

    shown = {k: given.pop(k) for k in ("outer", "title", "directions", "probes") if k in given}
    _check_arguments(given, unroll, ("problem", "params", "batches"), "innerloop.unroll, and outer")
    start, hyper = given.pop("params"), given.get("hyper")

    def leaf(x: Any) -> Any:
        return x.detach().clone().requires_grad_() if tree.differentiable(x) else x

    # The derivatives are wanted; the user's tensors stay as they are.
    given["hyper"] = None if hyper is None else tree.map_tensors(leaf, hyper)
    carry = given["problem"].init(start)
    carry = carry._replace(params={n: leaf(p) for n, p in carry.params.items()})
    traj = unroll(given.pop("problem"), carry, **{"strategy": Checkpointed(), **given})
    results: dict[str, object] = {}

    def write(page: Path) -> object:
        written = inspect.report(traj, page, progress=progress, **shown)
        results.update(written.results)
        results["left_out"] = written.left_out
        return written

    def text() -> str:
        lines = [repr(traj), f"inner loss {float(losses[0]):.6g} to {float(losses[-1]):.6g}"]
        lines += [str(results[n]) for n in ("diagnosis", "influence", "gains") if n in results]
        return "\n".join(lines)

    losses = traj.losses.detach()
    return Result(results, text, True, write)


def _check(given: dict[str, Any], progress: Progress) -> Result:
    from innerloop import Problem, check_metagradient, diagnose, inspect
    from innerloop.errors import MetaGradientError

    if not isinstance(given.get("problem"), Problem):
        _check_arguments(
            given,
            check_metagradient,
            ("outer_fn", "inputs"),
            "innerloop.diagnose (outer, problem, params, batches) or of "
            "innerloop.check_metagradient",
        )
        try:
            report = check_metagradient(**given)
        except MetaGradientError as error:
            text = str(error)
            return Result({"ok": False, "text": text}, lambda: text, False, None)
        return Result(report, lambda: str(report), report.ok, None)
    _check_arguments(given, diagnose, ("outer", "problem", "params", "batches"))
    found = diagnose(**{**given, "quiet": True})
    return Result(
        found, lambda: str(found), found.trusted, lambda page: inspect.report(found, page)
    )


def _attribute(given: dict[str, Any], progress: Progress) -> Result:
    from innerloop import attribute, inspect

    names = ("title", "images", "labels", "query_images", "query_labels")
    shown = {k: given.pop(k) for k in names if k in given}
    checks = {k: given.pop(k) for k in ("subsets", "drop") if k in given}
    _check_arguments(given, attribute, ("queries", "problem", "params", "batches"))
    found = attribute(**given)
    checked = found.check(**checks)
    good = float(checked.correlation.mean()) >= LEAST_CORRELATION
    verdict = "" if good else "\nTraining again does not do what the scores say: do not use them."
    result = {"losses": found.losses, "scores": found.scores, "check": checked}
    return Result(
        result,
        lambda: f"{found}\n{checked}{verdict}",
        good,
        lambda page: inspect.report(found, page, **shown),
    )


_ON_SCRIPTS: Mapping[str, Callable[[dict[str, Any], Progress], Result]] = {
    "inspect": _inspect,
    "check": _check,
    "attribute": _attribute,
}


def _examine(given: dict[str, Any]) -> int:
    from innerloop.doctor import examine

    if set(given) != {"model", "example"}:
        raise InvalidInputError(
            f"the function returned {sorted(given)}: return (model, example), a module and what it "
            "is called with"
        )
    report = examine(given["model"], given["example"])
    print(report)
    return OK if report.ok else DISAGREES


def _check_arguments(
    given: Mapping[str, object],
    function: Callable[..., object],
    needed: Sequence[str],
    what: str = "",
) -> None:
    """Raise unless the entries are arguments of a function, and those that it needs are there."""
    import inspect

    known = list(inspect.signature(function).parameters)
    unknown = [name for name in given if name not in known]
    missing = [name for name in needed if name not in given]
    if unknown or missing:
        wrong = f"has {unknown}, which are not among" if unknown else f"lacks {missing} of"
        raise InvalidInputError(
            f"the dict that the function returned {wrong} the arguments of "
            f"{what or f'innerloop.{function.__name__}'}: return {', '.join(needed)}, and what "
            "else you want to pass"
        )


def _written(page: Path, report: Callable[[Path], object] | None, *, asked: bool) -> str:
    """Write the page, and say so; a missing matplotlib is an error if a folder was asked for."""
    if report is None:
        return "No report: there is nothing to draw"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        report(page)
    except MissingExtraError as error:
        if asked:
            raise
        return f"No report: {error}"
    return f"Report: {page}"


def plain(found: object) -> object:
    """Return a result as dicts, lists and numbers, ready for JSON."""
    from torch import Tensor

    if isinstance(found, Tensor):
        if found.numel() > LARGE:
            return {"shape": list(found.shape), "norm": float(found.detach().double().norm())}
        return plain(found.detach().tolist())
    if isinstance(found, float):
        # JSON has no infinity.
        return found if math.isfinite(found) else None
    if isinstance(found, tuple) and hasattr(found, "_asdict"):
        return plain(found._asdict())
    if isinstance(found, Mapping):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(x) for x in found]
    return found if isinstance(found, (int, str, bool, type(None))) else repr(found)


def doctor(device: str = "cpu", *, markdown: bool = False) -> int:
    """Print what the audit of the installed PyTorch finds.

    Args:
        device: where the operations run.
        markdown: print a table for a page instead of one for the terminal.

    Returns:
        `DISAGREES` if a derivative is wrong without an error and innerloop lets it pass, else `OK`.
    """
    from innerloop import doctor as audit

    findings = tuple(audit.examine_all(device))
    print((audit.to_markdown if markdown else audit.to_text)(findings))
    return DISAGREES if any(finding.silent for finding in findings) else OK


def bench(rest: Sequence[str]) -> int:
    """Run the benchmarks of a clone of the repository, which the package does not carry.

    Args:
        rest: the arguments of ``python -m benchmarks``.
    """
    sys.path.insert(0, str(Path.cwd()))
    found = importlib.util.find_spec("benchmarks")
    if found is None or not (Path.cwd() / "benchmarks" / "contenders").is_dir():
        print(
            "innerloop bench: the benchmarks are not in this folder: run it in a clone of the "
            "repository, after pip install -e '.[bench]'",
            file=sys.stderr,
        )
        return FAILED
    code: int = importlib.import_module("benchmarks.__main__").main(rest)
    return code


def reinforcement_learning(options: argparse.Namespace) -> int:
    """Train as ``innerloop rl`` says, and write checkpoint, table and picture into a folder.

    Returns:
        `FAILED` if something does not fit or is missing, else `OK`.
    """
    import torch

    learner, kind = _learners()[options.learner]
    fields = [field.name for field in dataclasses.fields(kind)]
    # Small networks: a second thread costs more than it gains.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        given = {name: getattr(options, name) for name in fields}
        lists = {name: tuple(x) for name, x in given.items() if isinstance(x, list)}
        config = kind(**{**given, **lists})
        trainer = learner(config)
        trainer.train(options.out, resume=options.resume)
        print(trainer.summary())
        if not options.no_picture:
            print(f"Picture: {trainer.write_picture(options.out)}")
    except (InnerLoopError, OSError) as error:
        print(f"innerloop rl {options.learner}: {error}", file=sys.stderr)
        return FAILED
    finally:
        torch.set_num_threads(threads)
    return OK


def _learners() -> dict[str, tuple[Any, Any]]:
    """Return trainer and settings of each command behind ``innerloop rl``."""
    from innerloop.rl import meta, ppo

    return {
        "ppo": (ppo.PPO, ppo.PPOConfig),
        "meta": (meta.MetaLearner, meta.MetaConfig),
        "meta-gradient": (meta.MetaGradient, meta.MetaGradientConfig),
    }


def _add_settings(command: argparse.ArgumentParser, kind: Any) -> None:
    """Give a command one option for each field of a dataclass of settings."""
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        flag, hint = "--" + field.name.replace("_", "-"), types[field.name]
        more: dict[str, Any] = {"type": hint}
        if hint is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif get_origin(hint) is tuple:
            more = {"type": get_args(hint)[0], "nargs": "*"}
        elif type(None) in getattr(hint, "__args__", ()):
            more = {"type": next(t for t in hint.__args__ if t is not type(None))}
        command.add_argument(
            flag, default=field.default, help=f"(default: {field.default})", **more
        )


def _write_picture(result: Walkthrough, file: Path | None) -> int:
    target = PICTURE if file is None else file if file.suffix else file.with_suffix(PICTURE.suffix)
    try:
        write_picture(result, target)
    except MissingExtraError as error:
        print(f"\nNo picture: {error}", file=sys.stdout if file is None else sys.stderr)
        return OK if file is None else FAILED
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib cannot write
        print(f"\nNo picture: {target} cannot be written: {error}", file=sys.stderr)
        return FAILED
    print(f"\nPicture: {target}")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="innerloop", description="Differentiate through training in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"innerloop {version('innerloop')}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    command = commands.add_parser(
        "walkthrough",
        help="a two-parameter system whose every derivative is known, computed three ways",
        description="Print one inner SGD step, its outer gradient, the same with two models, and "
        "longer loops, each "
        "number as closed form, by autograd and by finite differences. Exits with 1 if they "
        "disagree.",
    )
    choice = command.add_mutually_exclusive_group()
    choice.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help=f"where to write the picture (default: {PICTURE})",
    )
    choice.add_argument("--no-picture", action="store_true", help="print the tables only")
    choice.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=REPORT,
        metavar="FILE",
        help=f"write a page for a browser, with a look inside (default: {REPORT})",
    )
    for name, text in (
        ("inspect", "look inside a training of your own: arguments of innerloop.unroll, and outer"),
        ("check", "is a meta-gradient worth anything? arguments of innerloop.diagnose, or of "
         "innerloop.check_metagradient"),
        ("attribute", "which example was it? arguments of innerloop.attribute"),
    ):  # fmt: skip
        command = commands.add_parser(
            name, help=text, description=f"{text}. Exits with 1 if a check fails, with 2 if it "
            "could not run.",
        )  # fmt: skip
        command.add_argument(
            "script", metavar="script.py:function", help="it returns a dict with the arguments"
        )
        command.add_argument(
            "--out", metavar="DIR", help=f"folder for {PAGE} (default: innerloop-{name})"
        )
        command.add_argument("--force", action="store_true", help=f"replace the {PAGE} there")
        command.add_argument(
            "--json", action="store_true", help="print everything that was found as JSON"
        )
    command = commands.add_parser(
        "doctor",
        help="which derivatives of which operations the installed PyTorch lacks or gets wrong, "
        "and what innerloop does about it",
        description="Probe the derivatives of the operations of torch.nn and others against "
        "finite differences, in float64; takes about "
        "forty seconds. Exits with 1 if a derivative is wrong without an error and innerloop lets "
        "it pass.",
    )
    command.add_argument(
        "script",
        nargs="?",
        metavar="script.py:make_model",
        help="look at one model instead: the function returns (model, example), a module and what "
        "it is called with; exits with 1 if an inner loop cannot be differentiated through it",
    )
    command.add_argument("--device", default="cpu", help="where the operations run (default: cpu)")
    command.add_argument("--markdown", action="store_true", help="print the table for a page")
    command = commands.add_parser(
        "rl",
        help="train by reinforcement learning: ppo, meta, meta-gradient",
        description="Train a policy. Every option is a field of the settings that the reference "
        "describes.",
    )
    learners = command.add_subparsers(dest="learner", required=True, metavar="LEARNER")
    for name, (learner, kind) in _learners().items():
        command = learners.add_parser(name, help=learner.__doc__.splitlines()[0])
        _add_settings(command, kind)
        command.add_argument(
            "--out",
            type=Path,
            default=Path(f"innerloop-{name}"),
            help="folder for checkpoint.pt, progress.csv and curve.png (default: innerloop-"
            f"{name})",
        )
        command.add_argument(
            "--resume", action="store_true", help="go on from the checkpoint in the folder"
        )
        command.add_argument("--no-picture", action="store_true", help="draw no learning curve")
    commands.add_parser(
        "bench",
        add_help=False,
        help="time and weigh every installed library on the same meta-gradients (in a clone of "
        "the repository; bench --help says more)",
    )
    return parser


def _print_what_the_terminal_can() -> None:
    """Show a question mark, not a traceback, where the terminal has no letter for θ."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
