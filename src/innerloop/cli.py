"""The command line: ``innerloop walkthrough``, ``doctor``, ``rl``, ``--version``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

from innerloop.errors import InnerLoopError, MissingExtraError
from innerloop.walkthrough import Walkthrough, run, to_text, write_picture

OK, DISAGREES, FAILED = 0, 1, 2
"""Exit codes: done; the walk-through's columns disagree; something is missing or unwritable."""
PICTURE = Path("innerloop-walkthrough.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: What stands behind ``innerloop`` on the command line; None reads it from there.
    """
    options = _parser().parse_args(arguments)
    _print_what_the_terminal_can()
    if options.command == "doctor":
        return doctor(options.device, markdown=options.markdown)
    if options.command == "rl":
        return reinforcement_learning(options)
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
        elif hint == tuple[int, ...]:
            more = {"type": int, "nargs": "*"}
        elif hint == tuple[str, ...]:
            more = {"type": str, "nargs": "*"}
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
    command = commands.add_parser(
        "doctor",
        help="which derivatives of which operations the installed PyTorch lacks or gets wrong, "
        "and what innerloop does about it",
        description="Probe the derivatives of the operations of torch.nn and others against "
        "finite differences, in float64; takes about "
        "forty seconds. Exits with 1 if a derivative is wrong without an error and innerloop lets "
        "it pass.",
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
    return parser


def _print_what_the_terminal_can() -> None:
    """Show a question mark, not a traceback, where the terminal has no letter for θ."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
