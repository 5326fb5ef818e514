"""Results as Markdown: the same tables are printed and written into `docs/benchmarks.md`."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.attention import PEER, Measured
from benchmarks.figures import Reading
from benchmarks.forecast import Forecast, table
from benchmarks.implicit import PEERS, Derivative
from benchmarks.imports import ImportTimes
from benchmarks.long import TIMES_HIGHER, LongTimes
from benchmarks.products import PRODUCTS, Product
from benchmarks.results import Result, Row, ratio
from benchmarks.spread import Spread
from benchmarks.updates import Update
from innerloop._utils import text_table


def workload_section(result: Result) -> str:
    """Times, ratios and memory of one workload, with what is needed to judge them."""
    parts = [f"### {result.workload}: {result.title}", _facts(result), _rows(result)]
    ratios = _ratios(result)
    if ratios:
        parts.append(
            "Time of ours over time of a peer, round by round: median (quartiles; min to max).\n\n"
            + ratios
        )
    return "\n\n".join(parts)


def import_section(times: ImportTimes, facts: Mapping[str, str]) -> str:
    rows = [
        (name, *(f"{value:.3f}" for value in _shown(Spread.of(seconds))))
        for name, seconds in (
            ("import torch", times.torch),
            ("then import innerloop", times.innerloop),
        )
    ]
    head = ("seconds", "median", "min", "lower quartile", "upper quartile", "max")
    told = f"{len(times.torch)} fresh processes. {_sentence(facts)}"
    return "\n\n".join(("### Import", told, _table(head, rows)))


def long_section(times: LongTimes, facts: Mapping[str, str]) -> str:
    """Peaks of long loops under `Checkpointed()`, and what they cost in time."""
    peaks = {
        "P7: MLP 32-256-256-10, batch 128": times.short,
        "the same": times.long,
        "P9: MLP 32-32-10, batch 16": times.endless,
        "M3's conv4, batch 25": times.conv4,
    }
    head = (
        "loop of Adam steps",
        "T",
        "slots",
        "peak MB",
        "above import",
        "slots (P + S) + 3 A",
        "s",
        "ms per step",
    )
    rows = [
        (
            name,
            f"{p.steps:,}",
            f"{p.slots:,}",
            f"{p.process:.0f}",
            _digits(p.above_import),
            _digits(p.model),
            _digits(p.seconds),
            _digits(1e3 * p.seconds / p.steps),
        )
        for name, p in peaks.items()
    ]
    growth = "; ".join(
        f"T={steps:,}: {_spread(spread)}" for steps, spread in times.growth().items()
    )
    told = [
        "### Long loops: `Checkpointed()`, its own choice of slots",
        f"Processor time. {_sentence(facts)}",
        _table(head, rows),
        f"P7, T=100: time of `Checkpointed()` over that of `StoreAll()`: {_spread(times.ratio)}.",
        f"P9: time per step over that at T=100: {growth}.",
    ]
    if times.gpt_seconds is not None and times.higher_steps is not None:
        steps = TIMES_HIGHER * times.higher_steps
        told.append(
            f"P8, M4 (SGD): higher does {times.higher_steps} steps in a process of "
            f"{times.higher_peak:.0f} MB (one more: "
            f"{times.higher_above:.0f} MB); `Checkpointed()` does {steps} in {times.gpt_peak:.0f} "
            f"MB and {times.gpt_seconds:.0f} s, "
            f"{_digits(1e3 * times.gpt_seconds / steps)} ms per step."
        )
    return "\n\n".join(told)


def figures_table(readings: Sequence[Reading]) -> str:
    rows = [(r.name, r.title, f"≤ {r.limit:g}", _number(r.value), r.verdict) for r in readings]
    return _table(("goal", "figure", "limit", "measured", ""), rows)


def forecast_section(forecasts: Sequence[Forecast], facts: Mapping[str, str]) -> str:
    """What `innerloop.plan` says before, and what is measured then."""
    about = (
        "Processor time of `unroll` and the backward pass; peak memory of a fresh process above "
        "its peak after a warm-up. "
        f"{_sentence(facts)}"
    )
    return f"### Forecasts of `innerloop.plan`\n\n{about}\n\n{table(list(forecasts))}"


def updates_section(updates: Sequence[Update], facts: Mapping[str, str]) -> str:
    """What a differentiable update of many tensors costs."""
    about = (
        "Ten recorded updates of 100 tensors from given gradients, without and with the backward "
        "pass through them: time over that of "
        "higher 0.2.1 (its Adam with weight decay beside our AdamW, which it does not have), "
        "median (quartiles; min to max). "
        f"{_sentence(facts)}"
    )
    head = ("rule", "shape", "ms per update", "update / higher's", "with its backward pass")
    rows = [
        (
            u.rule,
            " x ".join(map(str, u.shape)),
            f"{u.milliseconds:.2f}",
            _spread(u.update),
            _spread(u.with_backward),
        )
        for u in updates
    ]
    return f"### Updates of 100 tensors\n\n{about}\n\n{_table(head, rows)}"


def products_section(products: Sequence[Product], facts: Mapping[str, str]) -> str:
    """What a pullback costs."""
    about = (
        "Time of the pullback of one step of `Checkpointed`, eager, over that of one inner "
        "gradient: median (quartiles; min to max). "
        f"{_sentence(facts)}"
    )
    head = ["workload", "device", "one gradient", *PRODUCTS]
    rows = [
        [
            p.workload,
            p.device,
            f"{1e3 * p.gradient:.2f} ms",
            *(_spread(p.pullbacks[k]) for k in PRODUCTS),
        ]
        for p in products
    ]
    return f"### Second derivatives of a step\n\n{about}\n\n{_table(head, rows)}"


def implicit_section(derivatives: Sequence[Derivative], facts: Mapping[str, str]) -> str:
    """What the derivative of a given solution costs, beside other libraries."""
    about = (
        "The derivative of a solution that is given, in float64: the linear system and the "
        "products around it. JAX is compiled (its compilation is not timed), innerloop runs "
        "eagerly. Time of ours over that of a peer, round by round: median (quartiles; min to "
        "max); `error` is the largest relative error against the closed form, of all libraries. "
        f"{_sentence(facts)} BLAS: {torch_blas()} for PyTorch, Eigen for XLA."
    )
    head = ["solution", "innerloop", *(f"over {peer}" for peer in PEERS), "error"]
    rows = [
        [
            d.title,
            f"{_digits(1e3 * d.seconds)} ms",
            *(_spread(d.ratios[peer]) if peer in d.ratios else "" for peer in PEERS),
            f"{max(d.errors.values()):.0e}",
        ]
        for d in derivatives
    ]
    return f"### Implicit differentiation\n\n{about}\n\n{_table(head, rows)}"


def torch_blas() -> str:
    """Return the name of the linear algebra library that PyTorch was built with."""
    import torch

    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


def attention_section(steps: Sequence[Measured], facts: Mapping[str, str]) -> str:
    """What a second-order step costs in PyTorch's form, recomputed, and in ours."""
    about = (
        "An inner gradient with `create_graph=True` and a backward pass through its square: time "
        "over that of PyTorch's own form (the math "
        "kernel), and peak memory of a fresh process above its peak after a warm-up. "
        f"{_sentence(facts)}"
    )
    head = [
        "step",
        "device",
        "PyTorch",
        "recomputed",
        "innerloop",
        "MB: PyTorch",
        "recomputed",
        "innerloop",
    ]
    rows = [
        [
            m.case.title,
            m.device,
            f"{_digits(1e3 * m.seconds)} ms",
            *(
                _spread(m.ratios[form]) if form in m.ratios else ""
                for form in ("recomputed", "innerloop")
            ),
            *(
                f"{m.peaks[form]:,.0f}" if form in m.peaks else ""
                for form in (PEER, "recomputed", "innerloop")
            ),
        ]
        for m in steps
    ]
    return f"### Attention and cross-entropy\n\n{about}\n\n{_table(head, rows)}"


def as_json(
    results: Sequence[Result], readings: Sequence[Reading], long: LongTimes | None = None
) -> str:
    """Every single measurement, for whoever wants to draw or compare them."""
    everything = {
        "workloads": [dataclasses.asdict(result) for result in results],
        "long": None if long is None else dataclasses.asdict(long),
        "figures": [
            {**dataclasses.asdict(reading), "verdict": reading.verdict} for reading in readings
        ],
    }
    return json.dumps(everything, indent=1, ensure_ascii=False) + "\n"


def update(document: Path, sections: Mapping[str, str]) -> None:
    """Replace the named sections of `document`, each between its two marker comments; the others
    stay as they are."""
    text = document.read_text(encoding="utf-8") if document.exists() else "# Benchmarks\n"
    for name, section in sections.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        block = f"{begin}\n\n{section}\n\n{end}"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text, found = pattern.subn(lambda _, block=block: block, text)  # type: ignore[misc]
        if not found:
            text = f"{text.rstrip()}\n\n{block}\n"
    document.write_text(text, encoding="utf-8")


def _facts(result: Result) -> str:
    agreement = (
        f"every contender agrees with the float64 reference to {result.tolerance:.0e} in its "
        "worst parameter "
        f"(without second derivatives it would be off by {result.first_order_error:.1e})"
    )
    return textwrap.fill(
        f"{result.repeats} rounds, interleaved, {result.clock} time; {agreement}. "
        f"{_sentence(result.facts)} "
        f"Load of the machine while timing: {result.load:.1f}.",
        width=100,
        break_on_hyphens=False,
    )


def _sentence(facts: Mapping[str, str]) -> str:
    versions = ", ".join(
        f"{name} {version}" for name, version in facts.items() if name not in ("date", "machine")
    )
    return f"{facts['date']}, {facts['machine']}; {versions}."


def _rows(result: Result) -> str:
    with_memory = any(row.peak for row in result.rows)
    head = ["contender", "ms: median", "min", "quartiles", "max", "first call, s", "error"]
    head += ["peak MB", "above import"] if with_memory else []
    return _table(head, [_row(row, with_memory) for row in result.rows])


def _row(row: Row, with_memory: bool) -> list[str]:
    name = f"**innerloop: {row.label}**" if row.ours else row.label
    if row.problem:
        return [name, row.problem] + [""] * (7 if with_memory else 5)
    times = Spread.of([1e3 * s for s in row.seconds])
    quartiles = f"{_digits(times.quarter)} to {_digits(times.three_quarters)}"
    cells = [
        name,
        _digits(times.median),
        _digits(times.low),
        quartiles,
        _digits(times.high),
        "" if row.first is None else f"{row.first:.1f}",
        f"{row.error:.0e}",
    ]
    if with_memory:
        cells += (
            [f"{row.peak.process:.0f}", f"{row.peak.above_import:.0f}"] if row.peak else ["", ""]
        )
    return cells


def _ratios(result: Result) -> str:
    ours, peers = result.timed(ours=True), result.timed(ours=False)
    if not ours or not peers:
        return ""
    rows = [[f"**{row.label}**", *(_spread(ratio(row, peer)) for peer in peers)] for row in ours]
    return _table(["time of / time of", *(peer.label for peer in peers)], rows)


def _spread(s: Spread) -> str:
    return f"{s.median:.2f} ({s.quarter:.2f}, {s.three_quarters:.2f}; {s.low:.2f} to {s.high:.2f})"


def _shown(s: Spread) -> tuple[float, ...]:
    return s.median, s.low, s.quarter, s.three_quarters, s.high


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0e}" if 0 < value < 5e-4 else f"{value:.3f}" if value < 100 else f"{value:.0f}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{decimals}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table, padded so that it also reads in a terminal."""
    return text_table.table(rows, header=head, markdown=True)
