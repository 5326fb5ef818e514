"""Write docs/errors.md from the source: ``python scripts/errors_page.py [--check]``.

Every message that the package can raise is read from the source, with holes where values stand,
and put under the kind it belongs to; the kinds are explained here, by hand. ``--check`` changes
nothing and fails if the page is out of date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "innerloop"
PAGE = ROOT / "docs" / "errors.md"
HOLE = "…"
WARNINGS = (
    "PrecisionWarning",
    "UnreachedGradientWarning",
    "CapturedParameterWarning",
    "BiasedSurrogateWarning",
    "NotConvergedWarning",
)


PASSED_ON = {
    "nn/_replacements/elementary": "the catalogue says what each operation lacks and what to write",
    "optim/_settings": "`require`: the text is that of its callers, which are read",
    "strategy/_engine/guards": "the last argument of refuse_inputs and its kind, read there",
}
"""Modules that raise with a text handed to them, and where that text is read."""


class Message(NamedTuple):
    """One message of the source: its class, its text with holes, and the file it is in."""

    error: str
    text: str
    module: str


class Kind(NamedTuple):
    """A kind of errors, explained by hand.

    Attributes:
        title: the heading on the page.
        where: a pattern for ``Class module: text``; the first kind that fits takes a message.
        meaning: what such an error means.
        write: the line to write.
    """

    title: str
    where: str
    meaning: str
    write: str


KINDS = (
    Kind(
        "A tensor that needs a gradient is captured",
        r"CapturedTensorError|that requires? grad and is captured|captured by the loss",
        "A loss uses a tensor that requires grad without getting it as an argument. A "
        "strategy that "
        "runs steps again could not send a gradient to it.",
        'innerloop.unroll(problem, params, batches, hyper={"scale": scale})  '
        '# and hyper["scale"] in the loss',
    ),
    Kind(
        "Autograd and finite differences disagree",
        r"MetaGradientError",
        "`check_metagradient` or `plan` compared the derivative with finite differences, and they "
        "differ: the loss is not a function of its arguments, has a kink at this point, stops a "
        "gradient, or the precision is too low.",
        "innerloop.check_metagradient(outer, problem, params, batches, hyper=hyper)  # in float64",
    ),
    Kind(
        "A solution is not one, or its linear system is not solved",
        r"SolverError|SingularSystemError|IndefiniteSystemError|SolverNotConvergedError|"
        r"NotConvergedWarning| _linear/solvers",
        "Implicit differentiation solves a linear system where the inner problem is solved. Either "
        "the inner problem is not solved there, or it has no unique solution, or the solver is not "
        "made for such a matrix.",
        "strategy=innerloop.Implicit(innerloop.strategy.solvers.GMRES())  # any invertible matrix",
    ),
    Kind(
        "An optional package is missing",
        r"MissingExtraError",
        "This function needs a package that innerloop does not install by default.",
        "pip install 'innerloop[rl]'  # with the extra that the message names",
    ),
    Kind(
        "Checkpoints of an outer loop",
        r" _outer_state",
        "A file is missing, damaged, or does not fit the objects that it is loaded into; or an "
        "object cannot be kept in a file. Nothing was changed.",
        "innerloop.OuterState(model=model, optimizer=optimizer).load(path)  # as it was saved",
    ),
    Kind(
        "The loss does not depend on the parameters",
        r"does not depend on|independent of|INDEPENDENT|no gradient arrives|uses none of",
        "No gradient leads from the loss to what is trained: the loss was computed from other "
        "tensors, or a graph was cut on the way.",
        "loop.step(loss_fn(loop.model(x), y))  # loop.model, not model",
    ),
    Kind(
        "A second derivative is missing",
        r"second derivative|derivative of its own|once.differentiable|no derivative|"
        r"double backward|third derivative|NotDifferentiableError nn/|"
        r"NotDifferentiableError _inner_gradient/",
        "The gradient of the inner loss is differentiated again, and an operation has no second "
        "derivative. Most such operations of PyTorch are replaced; for this one write another.",
        "innerloop doctor  # on the command line: lists every operation, and what to write instead",
    ),
    Kind(
        "Forward-mode derivatives are missing",
        r"forward.mode|product=|\"mixed\"|jvp",
        '`ForwardMode` and `product="mixed"` push derivatives forward, which an operation or '
        "optimizer here does not allow.",
        'strategy=innerloop.Checkpointed(product="reverse")',
    ),
    Kind(
        "A strategy does not give this derivative",
        r" strategy/.*(does not differentiate|holds constant|constant|approximate|Truncated|"
        r"FirstOrder)|does not differentiate",
        "An approximate strategy treats a part of the loop as constant. What was asked for acts "
        "through that part, so its derivative would be wrong.",
        "strategy=innerloop.Checkpointed()  # exact, for everything",
    ),
    Kind(
        "A step could not be repeated",
        r"again|replay|repeat|differs|iterator|generator|exhausted",
        "A strategy that keeps few states runs steps twice. The second run saw other data or "
        "random "
        "numbers, or the data cannot be asked for twice.",
        "innerloop.unroll(problem, params, list(batches))  # data that stay what they are",
    ),
    Kind(
        "Batches and the number of steps",
        r" _batches|batches|steps=|save_at| _trajectory",
        "The data of the loop have another form than the four that `unroll` takes, or the "
        "number of "
        "steps cannot be read from them.",
        "innerloop.unroll(problem, params, [batch_0, batch_1])  # or: batches=fn, steps=T",
    ),
    Kind(
        "Reinforcement learning",
        r" rl/",
        "Something about a rollout, a surrogate or a normaliser would make a gradient wrong, or a "
        "surrogate is biased for the objective that was stated.",
        "innerloop.rl.surrogate(log_probs, advantages)  # Loaded DiCE, right for every derivative",
    ),
    Kind(
        "Transforms, threads and compiled code",
        r"compile|torch\.func|vmap|inference_mode|thread|is_compiling",
        "What was asked for does not work inside of a `torch.func` transform, in inference "
        "mode, or "
        "in compiled code.",
        "innerloop.metagradient(outer, problem, params, batches, compile=False)",
    ),
    Kind(
        "Modules, their names and their buffers",
        r" _module/|named_parameters|is not a module|buffer",
        "A name is not one of the module's, or the module cannot be seen as a function of its "
        "parameters.",
        "params = dict(model.named_parameters())",
    ),
    Kind(
        "A hand-written loop",
        r" _track/",
        "Inside of `with innerloop.track(...) as loop:` the loop stands for the model and the "
        "optimizer; this use of it would take no step, or one that cannot be differentiated.",
        "loop.step(loss_fn(loop.model(x), y))  # in place of loss.backward(); optimizer.step()",
    ),
    Kind(
        "Code written with higher",
        r" higher/",
        "The bridge was used in a way that it cannot carry out, mostly an override or a patched "
        "module that does not fit the optimizer.",
        "with innerloop.higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (f, "
        "d): ...",
    ),
    Kind(
        "Optimizers of torch and of other packages",
        r" optim/_(from_torch|adapt)/",
        "The optimizer has a class, a setting or a state that has no counterpart among the rules "
        "here, or that `adapt` could not verify.",
        "innerloop.optim.adapt(TheirOptimizer, lr=0.1)",
    ),
    Kind(
        "Settings of optimizers and transforms",
        r" optim/",
        "A setting is out of its range, has another type, or does not go with another one.",
        "innerloop.optim.sgd(lr=0.1, momentum=0.9)  # names, defaults and ranges as in torch.optim",
    ),
    Kind(
        "Arguments of innerloop's operations",
        r" nn/",
        "One of the functions of `innerloop.nn` was called with arguments that it does not take.",
        "innerloop.nn.functional.cross_entropy(logits, labels)  # arguments as in torch",
    ),
    Kind(
        "Strategies and plans",
        r" (strategy/|_plan|_check)",
        "A strategy, or a plan of several, was set up with a value that it cannot use.",
        'innerloop.Checkpointed(memory="2GB")',
    ),
    Kind(
        "Other arguments",
        r"",
        "An argument has the wrong type, value or shape.",
        "innerloop.Problem(loss, innerloop.optim.sgd(lr=0.1))",
    ),
)


def error_classes() -> set[str]:
    """Return the names of the classes in errors.py."""
    tree = ast.parse((SOURCE / "errors.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def text_of(node: ast.expr, names: Mapping[str, ast.expr], depth: int = 0) -> str:
    """Return the text of an expression, with a hole for everything that is not written out."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, names, depth) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        inner = text_of(node.value, names, depth + 1)
        return inner if isinstance(node.value, ast.Name | ast.IfExp) else HOLE
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".format"):
        template = text_of(node.func.value, names, depth)  # type: ignore[attr-defined]
        return re.sub(r"\{\w*\}", HOLE, template)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, names, depth) + text_of(node.right, names, depth)
    if isinstance(node, ast.IfExp):
        found = [text_of(branch, names, depth + 1) for branch in (node.body, node.orelse)]
        return " / ".join(dict.fromkeys(t for t in found if t.strip(f"{HOLE} "))) or HOLE
    name = getattr(node, "id", getattr(node, "attr", None))
    if name in names and depth < 4:
        value = names[name]
        plain = isinstance(value, ast.Constant) and isinstance(value.value, str)
        if plain or isinstance(value, ast.JoinedStr | ast.BinOp | ast.IfExp | ast.Call):
            return text_of(value, names, depth + 1)
    return HOLE


def assigned(tree: ast.AST) -> dict[str, ast.expr]:
    """Return what names are assigned to in a file."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            if isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


def messages() -> list[Message]:
    """Read every message of the package."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
    everywhere: dict[str, ast.expr] = {}
    for tree in trees.values():
        top = ast.Module([n for n in ast.iter_child_nodes(tree) if isinstance(n, ast.stmt)], [])
        shallow = ast.Module([n for n in top.body if isinstance(n, ast.Assign)], [])
        everywhere |= {k: v for k, v in assigned(shallow).items() if k.isupper()}
    classes, found = error_classes(), dict.fromkeys(())
    listed: dict[Message, None] = dict.fromkeys(found)
    makers = {
        node.name: [r.value for r in ast.walk(node) if isinstance(r, ast.Return) and r.value]
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    for path, tree in trees.items():
        names = {**everywhere, **assigned(tree)}
        module = path.relative_to(SOURCE).with_suffix("").as_posix()
        for error, argument in raised(tree, classes):
            for part in written(argument, makers):
                text = re.sub(r"\s+", " ", text_of(part, names)).strip()
                listed[Message(error, re.sub(f"({HOLE} ?)+{HOLE}", HOLE, text), module)] = None
    return list(listed)


def written(argument: ast.expr, makers: Mapping[str, list[ast.expr]]) -> list[ast.expr]:
    """Return where the text of a message is written: in place, or in the function that makes it."""
    if isinstance(argument, ast.Call):
        return makers.get(ast.unparse(argument.func).rpartition(".")[2]) or [argument]
    return [argument]


def unwritten() -> list[str]:
    """Return the places whose message is made at run time from nothing that can be read here."""
    found = [m for m in messages() if not m.text.strip(f"{HOLE} ")]
    return [f"{m.module}: {m.error}" for m in found if m.module not in PASSED_ON]


def raised(tree: ast.AST, classes: set[str]) -> Iterator[tuple[str, ast.expr]]:
    """Yield the class and the message of every error and warning that is made in a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        owner = ast.unparse(node.func).split(".")[0]
        if name in classes:
            yield name, node.args[0]
        elif owner in classes and name == "of":
            yield owner, ast.Constant(f"{HOLE} needs the package {HOLE}, which is not installed")
        elif name in ("refuse_inputs", "refuse_outputs", "refuse_use"):
            yield "NotDifferentiableError", node.args[-1]
        elif name == "require" and len(node.args) == 2:
            yield "InvalidInputError", node.args[1]
        elif name == "warn" and len(node.args) > 1 and ast.unparse(node.args[1]) in WARNINGS:
            yield ast.unparse(node.args[1]), node.args[0]


def kind_of(message: Message) -> Kind:
    """Return the first kind that a message fits."""
    line = f"{message.error} {message.module}: {message.text}"
    return next(kind for kind in KINDS if re.search(kind.where, line))


def page() -> str:
    """Return the text of the page."""
    listed = messages()
    lines = [
        "# Errors by message",
        "",
        "Every error of innerloop is a subclass of `innerloop.InnerLoopError` and says what was",
        "passed, why it cannot work, and what to write. This page groups all of them by what they",
        f"have in common. Where values stand in a message there is a {HOLE} here: search for the",
        "words around it. The page is written from the source by `make errors`.",
        "",
    ]
    for kind in KINDS:
        own = sorted(
            {(m.error, m.text) for m in listed if kind_of(m) is kind and m.text.strip(HOLE)},
            key=lambda pair: (pair[0], pair[1].lower()),
        )
        if not own:
            continue
        lines += [f"## {kind.title}", "", *wrapped(kind.meaning), ""]
        lines += ["```text" if kind.write.startswith(("pip", "innerloop doctor")) else "```", ""]
        lines[-1] = kind.write
        lines += ["```", ""]
        for error in dict.fromkeys(error for error, _ in own):
            lines += [f"`{error}`:", ""]
            for _, text in (pair for pair in own if pair[0] == error):
                lines += wrapped(escaped(text), "- ")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str) -> str:
    """Return a message as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_<>\[\]{}|$#~])", r"\\\1", text)


def wrapped(text: str, bullet: str = "") -> list[str]:
    """Break a paragraph into lines of at most 100 columns."""
    lines, line = [], bullet
    for word in text.split(" "):
        if len(line) + len(word) + 1 > 100 and line.strip():
            lines.append(line.rstrip())
            line = " " * len(bullet)
        line += ("" if not line.strip() or line == bullet else " ") + word
    return [*lines, line.rstrip()]


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    if not parser.parse_args().check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print("docs/errors.md is out of date: run `make errors`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
