"""The examples in CONTRIBUTING.md are complete commits, and do what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import lion_pytorch
import pytest
import torch

from tests.optimizers import leaf, leaves, train
from tests.oracles import (
    Task,
    assert_derivative,
    assert_params,
    directional,
    directions,
    inner,
    torch_run,
)

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}


# -- reading and applying the examples -------------------------------------------------------------


class Change(NamedTuple):
    """One block of code of the page: a whole file, or changes to one."""

    path: str
    language: str
    body: str


def examples() -> dict[str, list[Change]]:
    """The changes of each example, by the heading that says how many files it touches."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    part = text.partition("## Four examples")[2].partition("\n## ")[0]
    sections = dict(re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", part, re.DOTALL | re.MULTILINE))
    block = re.compile(r"^(`{3,})(\w+)\n# (\S+)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
    return {
        title: [Change(path, language, body) for _, language, path, body in block.findall(section)]
        for title, section in sections.items()
    }


def changed(text: str, body: str) -> str:
    """Apply lines with ``+`` and ``-`` between lines of context, which occur once in the file."""
    for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        new = "".join(line[1:] for line in lines if not line.startswith("-"))
        places = [place.start() for place in re.finditer(f"^{re.escape(old)}", text, re.MULTILINE)]
        assert len(places) == 1, f"not once in the file:\n{old}"
        text = text[: places[0]] + new + text[places[0] + len(old) :]
    return text


def test_changes_are_applied_where_their_context_stands() -> None:
    text = "a\nb\nc\n"
    assert changed(text, " b\n+x\n@@\n-c\n+d\n") == "a\nb\nx\nd\n"
    with pytest.raises(AssertionError, match="not once"):
        changed("b\nb\n", " b\n+x\n")


LIMITS = {"An optimizer": 3, "A strategy": 4, "A replaced operation": 3, "A command": 3}
NUMBERS = {"three": 3, "four": 4}


@pytest.mark.parametrize("kind", LIMITS)
def test_an_example_touches_as_many_files_as_its_heading_says(kind: str) -> None:
    (title,) = (title for title in examples() if title.startswith(f"{kind}: "))
    files = {change.path for change in examples()[title]}
    said = NUMBERS[title.partition(": ")[2].split()[0]]
    assert len(files) == said <= LIMITS[kind], files


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with all examples in it."""
    copy = tmp_path_factory.mktemp("repository")
    for folder in ("src", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "_build")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / file, copy / file)
    for change in (change for changes in examples().values() for change in changes):
        path = copy / change.path
        if change.language == "diff":
            path.write_text(changed(path.read_text(), change.body))
        else:
            assert not path.exists(), f"{change.path} is there already: choose another example"
            path.write_text(change.body)
    return copy


BUYS = {
    "An optimizer": ("tests/test_optimizer_contract.py", "lion", 25),
    "no optimizer changes its arguments": ("tests/test_optimizer_purity.py", "lion", 3),
    "an optimizer refuses bad values": ("tests/test_optimizer_errors.py", "lion", 4),
    "an optimizer under every strategy": ("tests/test_optimizer_strategies.py", "lion", 5),
    "an optimizer inside transforms": ("tests/test_optimizer_transforms.py", "lion", 5),
    "an optimizer at zero and tiny gradients": ("tests/test_numerics.py", "lion", 8),
    "A strategy": ("tests/test_strategy_contract.py", "(Discounted and not reference)", 15),
    "the strategy's docstring": (
        "src/innerloop/strategy/_discounted.py",
        "(Discounted and not reference)",
        1,
    ),
    "A replaced operation": ("tests/test_replace.py", "chebyshev_polynomial_t", 1),
    "A command": ("tests/test_cli.py", "supported_lists", 1),
    "none breaks a rule": ("tests/test_structure.py", "cycles or underscores or init_holds", 3),
}
"""What each example buys: a file of tests, the words that find them there, and how many pass at
least."""


class Unfit(NamedTuple):
    """Tests of the contract that ask for more than Lion is, and what they then say."""

    name: str
    says: str


UNFIT = {
    "it is no class of torch.optim, so from_torch does not know it": Unfit(
        r"continues_a_warm_torch_optimizer|half_precision_rounds",
        r"InvalidInputError: lion_pytorch\.lion_pytorch\.Lion has an update rule of its own",
    ),
    "lion-pytorch takes the complex sign, torch.optim the signs of real and imaginary part": Unfit(
        r"test_complex_parameters", r"AssertionError: z differs from torch\.optim"
    ),
    "a sign has no slope, so the momenta have the gradient zero": Unfit(
        r"(per_parameter_by_name|each_hyper_gradient_is_right_where.*)\[lion-betas",
        r"assert 0\.0 > 0\.00",
    ),
    "lion-pytorch takes values that the rule refuses": Unfit(
        r"values_that_torch_refuses.*\[lion-(betas|weight_decay)", r"Right contains \w+ more item"
    ),
}
"""Why a part of the contract does not fit the example: the names of the tests, and their errors."""


@pytest.fixture(scope="module")
def outcomes(applied: Path) -> str:
    """One line for each test: all run in one process, because starting it takes the longest."""
    files = {file for file, _, _ in BUYS.values()}
    words = " or ".join(words for _, words, _ in BUYS.values())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-rA", "--no-header", "--tb=short"),
            *("-p", "no:cacheprovider", "-p", "no:xdist", "-k", words, *sorted(files)),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=applied,
        env={**os.environ, "PYTHONPATH": str(applied / "src")},
    )
    assert done.returncode in (0, 1), done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def unfit(name: str) -> list[str]:
    """The reasons that a test does not fit the example."""
    return [reason for reason, tests in UNFIT.items() if re.search(tests.name, name)]


def ran(outcomes: str, file: str = "") -> dict[str, str]:
    """How each test of a file ended, by its name."""
    found = re.findall(
        rf"^(PASSED|FAILED|ERROR) ({re.escape(file)}.*?)(?: - .*)?$", outcomes, re.MULTILINE
    )
    return {name: how for how, name in found}


@pytest.mark.parametrize("kind", BUYS)
def test_an_example_works_as_it_stands(kind: str, outcomes: str) -> None:
    file, _, least = BUYS[kind]
    ended = {name: how for name, how in ran(outcomes, file).items() if not unfit(name)}
    assert set(ended.values()) == {"PASSED"}, outcomes[-10000:]
    assert len(ended) >= least, ended


@pytest.mark.parametrize("reason", UNFIT)
def test_a_test_that_does_not_fit_the_example_fails_for_the_reason_given(
    reason: str, outcomes: str
) -> None:
    """Every one of them, or it would have to be taken off the list."""
    names = [name for name in ran(outcomes) if reason in unfit(name)]
    assert names
    for name in names:
        assert unfit(name) == [reason], name
        title = re.escape(name.partition("::")[2])
        told = re.search(
            rf"^_+ {title} _+$(.*?)^(?:_+ test_|=+ )", outcomes, re.DOTALL | re.MULTILINE
        )
        assert told, f"{name} fits after all: {reason}"
        assert re.search(UNFIT[reason].says, told[1]), told[1]


# -- the optimizer, beside the class that it names -------------------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the example of an optimizer is."""
    (code,) = (
        change.body
        for changes in examples().values()
        for change in changes
        if change.path.endswith("lion.py")
    )
    module = types.ModuleType("innerloop_example_lion")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))  # noqa: S102
    return module


@pytest.mark.usefixtures("float64")
def test_the_example_optimizer_is_the_one_that_it_names(example: Any):
    task = Task()
    truth = torch_run(lion_pytorch.Lion, SETTINGS, task.params(), task.gradient, 10)
    assert_params(train(example.lion(**SETTINGS), task, task.params(), steps=10), truth, 1e-12)


@pytest.mark.usefixtures("float64")
def test_the_example_optimizer_has_the_derivatives_of_the_one_that_it_names(example: Any):
    task, start, lr, decay = Task(), leaves(Task().params()), leaf(0.01), leaf(0.1)
    final = train(
        example.lion(betas=(0.8, 0.95)), task, start, {"lr": lr, "weight_decay": decay}, steps=5
    )
    found = torch.autograd.grad(task.outer(final), [*start.values(), lr, decay])
    ours = (dict(zip(start, found, strict=False)), {"lr": found[-2], "weight_decay": found[-1]})
    along = (directions(task.params(), 1)[0], {"lr": 0.1, "weight_decay": 1.0})

    def outer(at: Any) -> float:
        settings = {"betas": (0.8, 0.95), **at[1]}
        return float(task.outer(torch_run(lion_pytorch.Lion, settings, at[0], task.gradient, 5)))

    at = (task.params(), {"lr": 0.01, "weight_decay": 0.1})
    assert_derivative(
        inner(ours, along), directional(outer, at, along), "d outer / d (init, lr, weight_decay)"
    )


@pytest.mark.usefixtures("float64")
def test_what_a_rule_gets_for_nothing(example: Any):
    assert repr(example.lion(lr=0.5)) == "lion(lr=0.5)"
    with pytest.raises(ValueError, match=r"betas\[0\]=1.5"):
        example.lion(betas=(1.5, 0.9))
    task, rates = Task(), torch.tensor([0.01, 0.02])
    many = torch.func.vmap(
        lambda lr: task.outer(train(example.lion(), task, task.params(), {"lr": lr}, steps=3))
    )(rates)
    one_by_one = [
        task.outer(train(example.lion(), task, task.params(), {"lr": float(lr)}, steps=3))
        for lr in rates
    ]
    torch.testing.assert_close(many, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)
