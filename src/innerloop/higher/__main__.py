"""``python -m innerloop.higher script.py``: run a program with the bridge in place of ``higher``.

The program is not changed: its ``import higher`` finds `innerloop.higher`.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

_USAGE = """usage: python -m innerloop.higher script.py [arguments]
       python -m innerloop.higher -m module [arguments]

Runs a program written for the library higher, unchanged, with innerloop.higher in its place."""


def stand_in() -> None:
    """Let ``import higher``, and imports of its submodules, find the bridge."""
    for name in ("", ".optim", ".patch", ".utils"):
        sys.modules[f"higher{name}"] = importlib.import_module(f"innerloop.higher{name}")


def main(arguments: Sequence[str]) -> int:
    """Run a program as ``python`` would, and return 0; 2 if it is not said which."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(_USAGE, file=sys.stdout if arguments[:1] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    stand_in()
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return 0
    if not Path(arguments[0]).exists():
        print(f"innerloop.higher: there is no file {arguments[0]}\n\n{_USAGE}", file=sys.stderr)
        return 2
    sys.argv = list(arguments)
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
