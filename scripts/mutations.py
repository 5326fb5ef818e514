"""Small mistakes in the lines that compute derivatives or update rules: what is changed, and how.

A mutation replaces one expression of one file by another: a sign, a factor, a dropped term, a
detach. `scripts/mutants.py` asks whether the tests notice.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "innerloop"

SUBJECTS = (
    "optim/_rules/*.py",
    "optim/_transforms/*.py",
    "optim/_engine/elementwise.py",
    "optim/_engine/grads.py",
    "optim/_engine/numerics.py",
    "optim/_engine/packing.py",
    "optim/_engine/per_tensor.py",
    "optim/_engine/strong_wolfe.py",
    "optim/_engine/update.py",
    "optim/_in_float32.py",
    "optim/_chain.py",
    "optim/_adapt/rule.py",
    "strategy/_engine/loop_function.py",
    "strategy/_engine/schedule.py",
    "strategy/_engine/snapshots.py",
    "strategy/_engine/step_operator.py",
    "strategy/_engine/step_pullback.py",
    "strategy/_checkpointed.py",
    "strategy/_first_order.py",
    "strategy/_forward_mode.py",
    "strategy/_outer_gradient.py",
    "strategy/_store_all.py",
    "strategy/_truncated.py",
    "_linear/*.py",
    "_inner_gradient/*.py",
    "_metagradient/*.py",
    "_carry.py",
    "_problem.py",
    "_unroll.py",
    "_track/*.py",
    "_utils/differences.py",
    "higher/_base.py",
    "higher/_nested.py",
    "higher/_rules.py",
    "higher/_fast_weights.py",
    "higher/_trainable.py",
    "higher/patch.py",
    "inspect/*.py",
    "nn/_replacements/*.py",
    "nn/_twice_differentiable.py",
    "nn/_derivative_order.py",
)
"""The files that compute derivatives or update rules, below ``src/innerloop``."""

NOT_COMPUTING = re.compile(
    r"^_?(check|validate|accept|require|refuse|warn|raise|lacks|forecast|slots_for|takes_|in_chunks"
    r"|slot_count|not_finite|in_bytes|compare|numbered|padding|zeros|edits|__post_init__|__repr__"
    r"|__format__|__eq__)"
)
"""Functions that judge what was passed or foresee what it costs, and compute nothing."""

CLOCK = re.compile(r"\b(perf_counter|process_time|monotonic)\(")
"""Measurements of time, which no derivative depends on."""

NUMBERS = re.compile(
    r"\b(int|float|len|max|min|abs|set|dict|numel|prod|sizes?|itemsize|detach|ceil|floor)\("
    r"|\bmath\.|\.shape\b|\bsizes\b|\.(eps|tiny|ndim|active|every|dropout_p|count|steps)\b"
    r"|^(count|n|t|steps|keys|flat|flips|evaluated|rows|low|ALPHA|self\.scale)$"
    r"|\b(advances|replays)\(|dtype=torch\.(bool|long)|^(begin|end|eps|best|step|infinity)$"
    r"|^_thread\."
)
"""What is never a tensor with a derivative: to detach it changes nothing."""

CONSTANT = {
    "nn/_replacements/cross_entropy.py": ("smooth",),
    "nn/_replacements/dropout.py": ("kept", "scale"),
    "nn/_replacements/grid_sample.py": ("upper", "span"),
}
"""Names of numbers, and of what is drawn at random, where no annotation says so."""

UNRECORDED = {
    "nn/_replacements/softmax_loss.py": ("_factor", "_at"),
    "strategy/_engine/step_pullback.py": ("add",),
    "strategy/_forward_mode.py": ("contract",),
}
"""Functions that are called in the forward of an autograd Function only, where nothing is recorded:
pullbacks, whose derivatives are those of another run."""

UNRECORDED_FILES = ("_linear/solvers.py", "inspect/_attribution.py")
"""Files whose functions are handed constants only: a linear system is solved once more for its own
derivative, and scores have none."""

DETACHED = "(lambda x: x.detach() if hasattr(x, 'detach') else x)"
"""Detach what is a tensor, and leave a number: so that the mutant is a number, not an error."""


class Mutant(NamedTuple):
    """One changed expression.

    Attributes:
        path: the file, below ``src/innerloop``.
        function: the qualified name of the function.
        line: where the expression stands; only for reading and for finding tests.
        statement: the first line of the statement it is in.
        kind: sign, factor, term, detach, graph, order, function.
        old: the expression, with the spaces of one line.
        new: what stands there in the mutant.
        count: 0 for the first time that this change is possible in this function, and so on.
        start: where the replaced text begins in the file, in characters.
        end: where it ends.
        text: what it is replaced by.
        idle: True if it evidently changes nothing.
    """

    path: str
    function: str
    line: int
    statement: int
    kind: str
    old: str
    new: str
    count: int
    start: int
    end: int
    text: str
    idle: bool

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return what names the mutant whatever is written above it in the file."""
        again = f" ({self.count + 1})" if self.count else ""
        return self.path, self.function, self.old, self.new + again

    def applied(self, source: str) -> str:
        """Return the text of the file with the change in it."""
        return source[: self.start] + self.text + source[self.end :]


class Change(NamedTuple):
    """A node to be replaced, by what text, and the node that shows it in its surroundings."""

    kind: str
    node: ast.AST
    text: str
    shown: ast.AST
    idle: bool


# -- what can be changed --------------------------------------------------------------------------


NOT_COMMUTATIVE = {
    *("add_scaled", "average", "average_of_squares", "with_derivative_of", "lerp", "sub", "div"),
    *("addcdiv", "matmul", "bmm"),
}
PAIRS = {
    "maximum": "minimum",
    "minimum": "maximum",
    "sin": "cos",
    "cos": "sin",
    "mean": "sum",
    "amax": "amin",
    "addcmul": "addcdiv",
    "addcdiv": "addcmul",
    "sub": "add",
    "cumsum": "cumprod",
    "clamp_min": "clamp_max",
    "logsumexp": "amax",
}
DROPPED = {
    *("sqrt", "square", "abs", "neg", "sign", "exp", "log", "reciprocal", "rsqrt", "conj", "relu"),
    *("sigmoid", "tanh", "erf", "t", "expm1", "log1p"),
}
TRANSPOSED = {"mT", "T", "mH"}


ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult, ast.Pow)


class _Finder(ast.NodeVisitor):
    """Collects the changes that are possible in one file, with the functions they are in."""

    def __init__(self, path: str, text: Callable[[ast.AST], str]) -> None:
        self._path, self._text = path, text
        self._functions: list[ast.FunctionDef] = []
        self._names: list[str] = []
        self._bases: list[str] = []
        self._statements = [0]
        self.found: list[tuple[str, int, Change]] = []

    def _add(self, kind: str, node: ast.AST, text: str, shown: ast.AST | None = None) -> None:
        idle = kind == "detach" and (self._records_nothing() or self._is_number(node))
        change = Change(kind, node, text, node if shown is None else shown, idle)
        self.found.append((".".join(self._names), self._statements[-1], change))

    # where changes are looked for

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Slice)):
            return  # messages, bounds and places are not what is computed
        if isinstance(node, (ast.Assign, ast.Expr, ast.Return)) and CLOCK.search(self._text(node)):
            return
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self._statements.append(node.lineno)
            super().visit(node)
            self._statements.pop()
        else:
            super().visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._names.append(node.name)
        self._bases.append(" ".join(map(ast.unparse, node.bases)))
        for statement in node.body:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                self.visit(statement)
        self._bases.pop()
        self._names.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if NOT_COMPUTING.match(node.name):
            return
        self._names.append(node.name)
        self._functions.append(node)
        for statement in node.body:
            self.visit(statement)
        self._functions.pop()
        self._names.pop()

    def visit_Module(self, node: ast.Module) -> None:
        for statement in node.body:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Tolerances and counts; a decision of an update rule is made by its own values."""

    # what is changed

    def visit_Return(self, node: ast.Return) -> None:
        value = "" if node.value is None else self._text(node.value)
        if node.value is not None and self._returns_tensor() and "zeros" not in value:
            self._add("factor", node.value, f"2 * ({value})", node)
            self._add("sign", node.value, f"-({value})", node)
            if not NUMBERS.search(value):
                self._add("detach", node.value, f"({value}).detach()", node)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        sides = node.left, node.right
        if any(_is_no_number(side) for side in sides) or self._counts(node):
            return
        left, right = (self._text(side) for side in sides)
        if isinstance(node.op, (ast.Add, ast.Sub)):
            other = "-" if isinstance(node.op, ast.Add) else "+"
            self._add("sign", node, f"({left} {other} ({right}))")
            self._add("term", node, f"({left})")
            self._add("term", node, f"({right})" if other == "-" else f"(-({right}))")
        elif isinstance(node.op, (ast.Mult, ast.Div)):
            other = "/" if isinstance(node.op, ast.Mult) else "*"
            self._add("factor", node, f"(({left}) {other} ({right}))")
            self._add("factor", node, f"({left})")
            if other == "/":
                self._add("factor", node, f"({right})")
        elif isinstance(node.op, ast.MatMult):
            self._add("order", node, f"(({right}) @ ({left}))")
        elif isinstance(node.op, ast.Pow):
            self._add("factor", node, f"({left})")
        for side in sides:
            if not isinstance(node.op, ARITHMETIC):
                continue
            if isinstance(side, ast.Constant) and isinstance(side.value, (int, float)):
                self._add("factor", side, repr(side.value + 1), node)
            elif self._may_be_tensor(side):
                self._add("detach", side, f"{DETACHED}({self._text(side)})", node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.value, (ast.Constant, ast.List, ast.ListComp, ast.Tuple)):
            return
        signs = {ast.Add: "-=", ast.Sub: "+=", ast.Mult: "/=", ast.Div: "*="}
        if type(node.op) in signs:
            target, value = self._text(node.target), self._text(node.value)
            self._add("sign", node, f"{target} {signs[type(node.op)]} ({value})")
            self._add("term", node, f"{target} = {value}")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self._add("sign", node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, inside = _called(node.func), node.func
        keywords = {word.arg: word.value for word in node.keywords}
        if name == "detach" and isinstance(inside, ast.Attribute) and not node.args:
            self._add("detach", node, f"({self._text(inside.value)})")
        if name in DROPPED and isinstance(inside, ast.Attribute):
            owner = self._text(inside.value)
            if owner in ("torch", "math"):
                self._add("function", node, f"({self._text(node.args[0])})")
            elif not node.args:
                self._add("function", node, f"({owner})")
        if name in PAIRS and isinstance(inside, ast.Attribute):
            owner = self._text(inside.value)
            self._add("function", inside, f"{owner}.{PAIRS[name]}", node)
        if name in NOT_COMMUTATIVE and len(node.args) >= 2:
            first, second = node.args[:2]
            both = _Span(first, second)
            self._add("order", both, f"{self._text(second)}, {self._text(first)}", node)
        if name == "where" and len(node.args) == 3:
            first, second = node.args[1:]
            both = _Span(first, second)
            self._add("order", both, f"{self._text(second)}, {self._text(first)}", node)
        if name == "add_scaled" and len(node.args) == 3:
            if not isinstance(node.args[2], ast.UnaryOp):  # its sign is changed where it stands
                self._add("sign", node.args[2], f"-({self._text(node.args[2])})", node)
            self._add("factor", node.args[2], "1.0", node)
            self._add("term", node, f"({self._text(node.args[0])})")
        for word in ("alpha", "value", "weight", "beta"):
            if word in keywords and not isinstance(
                keywords[word], (ast.Constant, ast.Name, ast.Lambda)
            ):
                self._add("sign", keywords[word], f"-({self._text(keywords[word])})", node)
                self._add("factor", keywords[word], f"2 * ({self._text(keywords[word])})", node)
        if "create_graph" in keywords:
            value = keywords["create_graph"]
            is_false = isinstance(value, ast.Constant) and value.value is False
            self._add("graph", value, "True" if is_false else "False", node)
        if name == "enable_grad":
            self._add("graph", inside, "torch.no_grad", node)
        if name not in ("len", "range", "reshape", "view", "expand", "range", "isinstance"):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in TRANSPOSED and isinstance(node.ctx, ast.Load):
            self._add("order", node, self._text(node.value))
        self.generic_visit(node)

    # what is known of types

    def _returns_tensor(self) -> bool:
        returns = self._functions[-1].returns
        return returns is not None and bool(
            re.match(r"(Tensor|Float\[Tensor, [^\]]*\])$", ast.unparse(returns))
        )

    def _annotation(self, name: str) -> str:
        for function in reversed(self._functions):
            arguments = function.args
            for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                if one.arg == name:
                    return ast.unparse(one.annotation) if one.annotation else ""
        return ""

    def _may_be_tensor(self, node: ast.expr) -> bool:
        owner = node.value if isinstance(node, ast.Subscript) else node
        annotation = self._annotation(owner.id) if isinstance(owner, ast.Name) else ""
        if re.search(r"^(int|float|bool)$|, float\]$", annotation):
            return False
        known = isinstance(node, (ast.Name, ast.Call, ast.Attribute, ast.Subscript))
        return known and not NUMBERS.search(self._text(node))

    def _records_nothing(self) -> bool:
        """True in what autograd calls while it records nothing: there is nothing to detach."""
        base, name = self._bases[-1] if self._bases else "", self._names[-1]
        if self._path in UNRECORDED_FILES or name in UNRECORDED.get(self._path, ()):
            return True
        if base.endswith("TwiceDifferentiable"):
            return name in ("forward", "vjp", "jvp", "vjp_of_jvp", "_output", "_pushed", "_weights")
        return base.endswith("autograd.Function") and name == "forward"

    def _is_number(self, node: ast.AST) -> bool:
        """True if the annotations say that ``node`` is a number."""
        if isinstance(node, ast.Constant):
            return True
        if isinstance(node, ast.BinOp):
            return self._is_number(node.left) and self._is_number(node.right)
        if isinstance(node, ast.Call):
            function = node.func
            return isinstance(function, ast.Name) and (
                function.id in ("float", "int", "len")
                or self._annotation(function.id).endswith(", float]")
            )
        if not isinstance(node, ast.Name):
            return False
        if node.id in CONSTANT.get(self._path, ()) or self._was_tensor(node):
            return True
        if self._annotation(node.id):
            return self._annotation(node.id) in ("int", "float", "bool")
        assigned = [
            statement.value
            for statement in ast.walk(self._functions[-1])
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == node.id
        ]
        return bool(assigned) and all(
            isinstance(value, (ast.Constant, ast.BinOp)) and self._numbers_only(value)
            for value in assigned
        )

    def _was_tensor(self, node: ast.Name) -> bool:
        """True below ``if isinstance(node, Tensor): return ...``."""
        return any(
            isinstance(statement, ast.If)
            and ast.unparse(statement.test) == f"isinstance({node.id}, Tensor)"
            and isinstance(statement.body[-1], ast.Return)
            and statement.body[-1].lineno < node.lineno
            for statement in self._functions[-1].body
        )

    def _numbers_only(self, value: ast.expr) -> bool:
        """True for arithmetic of arguments that are numbers, and of sizes."""
        names = [node for node in ast.walk(value) if isinstance(node, ast.Name)]
        sized = ".shape" in self._text(value)
        return not any(isinstance(node, ast.Call) for node in ast.walk(value)) and all(
            self._annotation(name.id) in ("int", "float", "bool") or sized for name in names
        )

    def _counts(self, node: ast.BinOp) -> bool:
        """True if whole numbers that place or count something are added."""
        names = {
            "t",
            "i",
            "j",
            "k",
            "n",
            "steps",
            "start",
            "stop",
            "count",
            "depth",
            "times",
            "used",
        }
        for side in (node.left, node.right):
            if isinstance(side, ast.Call) and _called(side.func) in (
                "len",
                "range",
                "list",
                "tuple",
            ):
                return True
            if isinstance(side, ast.Name) and self._annotation(side.id) == "int":
                return True
            if isinstance(side, ast.Name) and side.id in names:
                return True
        text = self._text(node)
        return (
            "set(" in text
            or ".keys()" in text
            or "statistics" in text
            or "numel() *" in text
            or "* p.numel()" in text
        )


class _Span(ast.AST):
    """Two expressions that follow each other."""

    def __init__(self, first: ast.expr, last: ast.expr) -> None:
        self.lineno, self.col_offset = first.lineno, first.col_offset
        self.end_lineno, self.end_col_offset = last.end_lineno, last.end_col_offset


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_no_number(node: ast.expr) -> bool:
    """True for texts and collections, which ``+`` joins."""
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, (int, float, complex))
    no_numbers = (ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.Starred)
    return isinstance(node, no_numbers) or (
        isinstance(node, ast.BinOp) and (_is_no_number(node.left) or _is_no_number(node.right))
    )


# -- which of them are tried ----------------------------------------------------------------------


def files(package: Path = PACKAGE) -> list[Path]:
    """Return the files of `SUBJECTS`."""
    found = {path for pattern in SUBJECTS for path in package.glob(pattern)}
    return sorted(path for path in found if path.name != "__init__.py")


def mutants_of(path: Path, package: Path = PACKAGE) -> list[Mutant]:
    """Return every mutant of one file, in the order of the file; each of them compiles."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))

    def place(line: int, column: int) -> int:
        return offsets[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def bounds(node: ast.AST) -> tuple[int, int]:
        start = place(node.lineno, node.col_offset)
        return start, place(node.end_lineno, node.end_col_offset)

    def text(node: ast.AST) -> str:
        start, end = bounds(node)
        return source[start:end]

    finder = _Finder(str(path.relative_to(package)), text)
    finder.visit(ast.parse(source))
    found: list[Mutant] = []
    seen: dict[tuple[str, str, str], int] = {}
    for function, statement, change in finder.found:
        (start, end), (left, right) = bounds(change.node), bounds(change.shown)
        old = source[left:right]
        new = source[left:start] + change.text + source[end:right]
        old, new = (_one_line(part.replace(DETACHED, "detached")) for part in (old, new))
        count = seen.get((function, old, new), 0)
        seen[function, old, new] = count + 1
        mutant = Mutant(
            str(path.relative_to(package)),
            function,
            change.node.lineno,
            statement,
            change.kind,
            old,
            new,
            count,
            start,
            end,
            change.text,
            change.idle,
        )
        if old != new and _compiles(mutant.applied(source)):
            found.append(mutant)
    return found


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _compiles(source: str) -> bool:
    try:
        compile(source, "<mutant>", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def all_mutants() -> list[Mutant]:
    """Return every mutant of every file."""
    return [mutant for path in files() for mutant in mutants_of(path)]


def chosen(count: int, seed: int, among: Iterable[Mutant] | None = None) -> list[Mutant]:
    """Draw ``count`` mutants, and leave out those of them that evidently change nothing.

    One of each file comes first, the rest has equal chances.
    """
    draw = random.Random(seed)
    pool = list(all_mutants() if among is None else among)
    draw.shuffle(pool)
    first: dict[str, Mutant] = {}
    for mutant in pool:
        first.setdefault(mutant.path, mutant)
    ones = list(first.values())
    rest = [mutant for mutant in pool if first[mutant.path] is not mutant]
    drawn = [mutant for mutant in (ones + rest)[:count] if not mutant.idle]
    return sorted(drawn, key=lambda mutant: (mutant.path, mutant.start))


def by_file(mutants: Iterable[Mutant]) -> Iterator[tuple[str, list[Mutant]]]:
    """Yield each file with its mutants."""
    groups: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault(mutant.path, []).append(mutant)
    yield from groups.items()
