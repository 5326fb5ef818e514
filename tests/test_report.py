"""`innerloop.inspect.report`: what the pages hold, and that they fetch nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import innerloop
from innerloop import inspect, walkthrough
from innerloop.inspect._report.page import Section, page, words
from innerloop.inspect._report.reach import reach

pytest.importorskip("matplotlib")
T = 4
CURVATURE = {"a": torch.tensor([0.5, 1.0, 3.0]), "b": torch.tensor(2.0)}
LR = 0.3


def loss(params: Any, hyper: Any, batch: Any) -> Tensor:
    parts = [(CURVATURE[n].to(p) * p.square()).sum() / 2 for n, p in params.items()]
    return torch.stack(parts).sum()


def outer(traj: Any, hyper: Any) -> Tensor:
    return torch.stack([p.sin().sum() for p in traj.params.values()]).sum()


def run(copies: int = 1, strategy: Any = None) -> innerloop.Trajectory:
    """A diagonal map; ``copies`` of every number make the model larger."""
    start = {
        n: torch.ones(copies, *c.shape, dtype=torch.float64).squeeze(0)
        for n, c in CURVATURE.items()
    }
    return innerloop.unroll(
        innerloop.Problem(loss, innerloop.optim.sgd(lr=LR)),
        {n: p.requires_grad_() for n, p in start.items()},
        None,
        steps=T,
        strategy=strategy,
    )


def check_page(file: Path, *texts: str) -> str:
    """It is one file, which fetches nothing."""
    text = file.read_text()
    assert len(text) < 3e6
    assert "default-src 'none'" in text
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(a.startswith(("data:", "#")) for a in addresses), addresses
    assert "@import" not in text
    assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)\)", text))
    for expected in texts:
        assert expected in text, expected
    own = re.findall(r'\bid="([^"]*)"', text)
    assert len(own) == len(set(own))
    return text


@pytest.mark.parametrize("strategy", [innerloop.StoreAll(), innerloop.Checkpointed(slots=2)])
def test_every_step_s_hold_on_the_end(strategy: Any) -> None:
    """Of a diagonal map the norms of blocks are exact, whatever the signs."""
    traj = run(strategy=strategy)
    factors = {n: 1 - LR * c.double() for n, c in CURVATURE.items()}
    single = reach(traj, outer(traj, None), None)
    assert single.exact
    assert single.names == ("a[0]", "a[1]", "a[2]", "b")
    flat = torch.cat([factors["a"], factors["b"][None]])
    for t in range(T + 1):
        truth = torch.diag(flat ** (T - t))
        torch.testing.assert_close(single.values[t], truth, rtol=1e-6, atol=1e-12)
    traj = run(copies=10, strategy=strategy)
    blocks = reach(traj, outer(traj, None), None, probes=2)
    assert not blocks.exact
    assert blocks.names == ("a", "b")
    for t in range(T + 1):
        norms = [(10 * (f ** (2 * (T - t))).sum()).sqrt() for f in factors.values()]
        torch.testing.assert_close(
            blocks.values[t], torch.diag(torch.stack(norms)), rtol=1e-6, atol=1e-12
        )


@pytest.mark.slow
def test_a_report_of_a_loop(tmp_path: Path) -> None:
    told: list[Any] = []
    written = inspect.report(
        run(copies=10, strategy=innerloop.Checkpointed()),
        tmp_path / "page.html",
        outer=outer,
        title="A <title>",
        progress=lambda *event: told.append(event),
    )
    assert written.left_out == {}
    names = {"course", "diagnosis", "influence", "paths", "reach", "gains", "curvature", "lyapunov"}
    assert set(written.results) == names | {"plan"}
    text = check_page(
        written.file,
        "A &lt;title&gt;",
        "Trusted for steps of size 0.01",
        'class="slide"',
        "sgd(lr=0.3)",
        torch.__version__,
    )
    assert text.count('class="slide" data-label="step') == T + 1
    assert told[-1][1] == told[-1][2]
    assert len(written.results["course"].losses) == T
    for result in written.results.values():
        if hasattr(result, "plot"):
            assert result.plot().axes


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """Without an outer loss, and of a tracked loop."""
    model = torch.nn.Linear(2, 1)
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=0.1)) as loop:
        loop.step(loop.model(torch.ones(3, 2)).square().mean())
        written = inspect.report(loop, str(tmp_path / "page.html"), directions=0)
    check_page(written.file, "Left out", "pass outer=, the outer loss")
    assert {"course", "reach"} <= set(written.results)
    assert written.results["course"].params["weight[0]"].shape == (2,)


def found() -> inspect.Attribution:
    x = torch.linspace(-1, 1, 12)

    def weighted(params: Any, hyper: Any, batch: Any) -> Tensor:
        return (hyper["weights"] * (params["p"] - x) ** 2).mean()

    return innerloop.attribute(
        lambda params: torch.stack([params["p"] ** 2, (params["p"] - 1) ** 2]),
        innerloop.Problem(weighted, innerloop.optim.sgd(lr=0.1)),
        {"p": torch.tensor(0.2)},
        None,
        steps=3,
        hyper={"weights": torch.ones(12)},
    )


def test_a_report_of_an_attribution(tmp_path: Path) -> None:
    attribution = found()
    assert attribution.checked is None
    checked = attribution.check(subsets=4, drop=0.2)
    diagnosis = innerloop.diagnose(
        outer, innerloop.Problem(loss, innerloop.optim.sgd(lr=LR)),
        {n: torch.ones_like(c) for n, c in CURVATURE.items()}, None, steps=2, probes=2, quiet=True,
    )  # fmt: skip
    written = inspect.report(
        [diagnosis, attribution],
        tmp_path / "page.html",
        images=torch.rand(12, 3, 4, 4),
        labels=[f"a & {i}" for i in range(12)],
        query_images=torch.rand(2, 4, 4),
    )
    assert attribution.checked is checked
    assert set(written.results) == {"diagnosis", "attribution"}
    text = check_page(
        written.file, "the ranks of the scores hold", "most harmful", "a &amp; 3", "Trusted"
    )
    assert text.count("data:image/png") == 2 + 2 * 2 * 8


def test_a_chaotic_training_is_called_so(tmp_path: Path) -> None:
    """The verdict is that of the check, not that of the scores."""
    attribution = found()
    attribution.checked = attribution.check(subsets=4, drop=0.2)._replace(
        correlation=torch.tensor([0.1, 0.2])
    )
    written = inspect.report(attribution, tmp_path / "page.html")
    check_page(written.file, "No: training again does not do what the scores say", "0.150")


@pytest.mark.usefixtures("types_unchecked")
def test_what_cannot_be_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.html"
    with pytest.raises(innerloop.InvalidInputError, match="a report of dict is not known"):
        inspect.report({}, file)  # type: ignore[arg-type]
    with pytest.raises(innerloop.InvalidInputError, match="one image for each of the 12"):
        inspect.report(found(), file, images=torch.rand(11, 4, 4))
    with pytest.raises(innerloop.InvalidInputError, match="labels has 1 lines"):
        inspect.report(found(), file, labels=["one"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(innerloop.MissingExtraError, match=r"innerloop\[plot\]"):
        inspect.report(found(), file)
    with pytest.raises(innerloop.MissingExtraError, match=r"innerloop\[plot\]"):
        walkthrough.write_report(None, file)  # type: ignore[arg-type]
    assert not file.exists()


@pytest.mark.slow
def test_the_walkthrough_as_a_page(tmp_path: Path) -> None:
    file = walkthrough.write_report(walkthrough.run(), tmp_path / "page.html")
    text = check_page(file, "All columns agree", "-0.1789599744", 'class="slide"')
    assert "✗" not in text


CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="scripts/install-chromium.sh was not run")
def test_a_browser_has_nothing_to_say(tmp_path: Path) -> None:
    """No error in the console, and the slider's script has run; a broken page is noticed."""

    def console(file: Path) -> tuple[str, str]:
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless=new", "--no-sandbox", "--enable-logging=stderr",
                "--virtual-time-budget=2000", "--dump-dom", file.as_uri(),
            ],
            check=True, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        return done.stdout, "".join(s for s in done.stderr.splitlines() if "CONSOLE" in s)

    file = inspect.report(run(), tmp_path / "page.html", directions=0).file
    shown, said = console(file)
    assert not said
    assert 'class="slide shown"' in shown
    broken = tmp_path / "broken.html"
    image = '<img src="https://example.org/a.png">'
    broken.write_text(page("broken", [Section("one", words("two") + image)]))
    assert "Content Security Policy" in console(broken)[1]
