"""Run the fuzzer: ``python -m tests.fuzz --seed 1 --cases 20000``."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz import faults, verdict
from tests.fuzz.case import draw
from tests.fuzz.truth import world


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--start", type=int, default=0, help="the number of the first case")
    parser.add_argument(
        "--only", type=int, help="judge this case alone, and say which input is off"
    )
    parser.add_argument("--refusals", action="store_true", help="list the refusals by message")
    parser.add_argument("--fault", choices=faults.FAULTS, help="plant a fault, and stop when found")
    parser.add_argument("--newest", action="store_true", help="give extras to every case")
    arguments = parser.parse_args()
    newest = arguments.newest
    if arguments.only is not None:
        return explain(arguments.seed, arguments.only, newest=newest)

    numbers = range(arguments.start, arguments.start + arguments.cases)
    if arguments.fault:
        return plant(arguments.fault, arguments.seed, numbers, newest=newest)

    def each(found: verdict.Verdict, tally: verdict.Tally) -> None:
        if found.kind in verdict.FINDINGS:
            print(found, flush=True)
        if tally.total % 100 == 0:
            print(tally, flush=True)

    tally = verdict.run(arguments.seed, numbers, each, newest=newest)
    print(f"seed {arguments.seed}: {tally}")
    if arguments.refusals:
        for reason, count in tally.refusals.most_common():
            print(f"{count:6} {reason}")
    print(f"never right: {sorted(verdict.enrolled() - set(tally.right))}")
    found = [v.number for v in tally.findings]
    print(f"found: {found}")
    return 1 if found else 0


def plant(fault: str, seed: int, numbers: range, *, newest: bool) -> int:
    """Plant a fault, and judge until a case shows it that is right without."""
    for number in numbers:
        with faults.FAULTS[fault]():
            found = verdict.judge(seed, number, newest=newest)
        if found.kind != verdict.SILENT:
            continue
        if verdict.judge(seed, number, newest=newest).kind == verdict.RIGHT:
            print(f"{fault} is found by case {number}: {found.reason}")
            return 1
    print(f"{fault} is not found")
    return 0


def explain(seed: int, number: int, *, newest: bool) -> int:
    """Judge one case, and compare the derivative in each input on its own."""
    found = verdict.judge(seed, number, newest=newest)
    print(found)
    if found.kind == verdict.BARE:
        from tests.fuzz.answers import answer

        answer(world(draw(seed, number, newest=newest)))
    if found.kind == verdict.SILENT:
        # In double precision, as the case was judged: another world is drawn otherwise.
        with verdict.quietly():
            w = world(draw(seed, number, newest=newest))
        for name, (said, true) in verdict.blamed(w).items():
            print(f"    {name}: {said:.9g}, by differences {true:.9g}")
    return 1 if found.kind in verdict.FINDINGS else 0


if __name__ == "__main__":
    sys.exit(main())
