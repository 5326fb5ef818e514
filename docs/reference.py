"""Sphinx extension: the reference, written from the `__all__` of the public modules.

A page of ``docs/api`` holds its prose and, inside of an ``eval-rst`` block, a line such as
``.. public:: innerloop.strategy``. That line becomes the description of every name that the module
exports, so a new export needs no change here. ``.. public:: innerloop.optim rules`` takes one
section of a module, and ``.. public:: innerloop.optim rest`` whatever no section takes.

An object that several names lead to is described once, under the name that comes first in
`MODULES`; its other names are mentioned there and lead there.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry, PythonDomain
from sphinx.environment import BuildEnvironment

from innerloop.nn import _catalogue

MODULES = (
    "innerloop",
    "innerloop.optim",
    "innerloop.optim.helpers",
    "innerloop.strategy",
    "innerloop.strategy.solvers",
    "innerloop.nn",
    "innerloop.nn.functional",
    "innerloop.inspect",
    "innerloop.rl",
    "innerloop.rl.envs",
    "innerloop.rl.ppo",
    "innerloop.rl.meta",
    "innerloop.errors",
    "innerloop.doctor",
    "innerloop.walkthrough",
    "innerloop.cli",
    "innerloop.higher.optim",
    "innerloop.higher.patch",
    "innerloop.higher.utils",
    "innerloop.higher",
)
"""The public modules; an object is described under the first one that exports it."""

FIRST = "track TrackedLoop Problem unroll metagradient Trajectory Carry functional".split()
"""Names that open their page, in this order; the other names follow by alphabet."""

MEMBERS = {
    "Problem": ("from_module", "init", "step"),
    "Rule": ("init", "update", "validate", "resolve"),
    "Elementwise": ("init", "update", "fields", "step"),
    "PerTensor": ("init", "update", "fields", "start", "step"),
    "Adapted": ("init", "update"),
    "Transform": ("init", "apply", "validate", "resolve"),
    "Loop": ("batch",),
    "OuterState": ("save", "load"),
    "ActorCritic": ("distribution", "values"),
    "Auto": (),
    "Checkpointed": ("slots_for",),
    "ForwardMode": ("online",),
    "StoreAll": (),
    "Truncated": (),
    "FirstOrder": (),
    "Evolution": ("online",),
    "Implicit": (),
    "Solver": ("run", "limit"),
    "CG": (),
    "Dense": (),
    "FixedPoint": (),
    "GMRES": (),
    "Neumann": (),
    "NormalCG": (),
    "Trajectory": ("params", "losses", "at", "times"),
    "Plan": ("best", "fits"),
    "Packed": (),
    "MissingExtraError": (),
}
"""Which members users call, where a class has further ones for the package's own use."""

NEVER = ("torch_layout", "state_type")
"""Members that no description shows."""


class Entry(NamedTuple):
    """One object of the reference: the name it is described under, its other names, itself."""

    name: str
    others: tuple[str, ...]
    value: object


def exported(module: ModuleType) -> list[str]:
    """Return the public names of a module: its `__all__`, or else what it defines itself."""
    names = getattr(module, "__all__", None)
    if names is not None:
        return list(names)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def entries() -> list[Entry]:
    """Gather every public object that is no module, each once, with all of its names."""
    found: dict[int, tuple[list[str], object]] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        # `sgd` comes before `SGD`: the lower-case name of a rule is the one to write.
        for name in sorted(exported(module), key=lambda name: (name != name.lower(), name)):
            value = getattr(module, name)
            if not inspect.ismodule(value):
                found.setdefault(id(value), ([], value))[0].append(f"{path}.{name}")
    return [Entry(names[0], tuple(names[1:]), value) for names, value in found.values()]


ENTRIES = entries()
OTHERS = {entry.name: entry.others for entry in ENTRIES}


def is_state(value: object) -> bool:
    """True if an object is the named tuple in which a rule or a transform keeps its state."""
    return inspect.isclass(value) and issubclass(value, tuple) and lies_in(value, "optim._")


def lies_in(value: object, *rooms: str) -> bool:
    """True if an object is defined in one of the rooms of the package."""
    module = str(getattr(value, "__module__", ""))
    return any(module.startswith(f"innerloop.{room}") for room in rooms)


SECTIONS: dict[str, Callable[[object], bool]] = {
    "support": lambda value: lies_in(value, "optim._from_torch"),
    "states": is_state,
    "rules": lambda value: lies_in(value, "optim._rules"),
    "transforms": lambda value: (
        lies_in(value, "optim._transforms", "optim._chain") and not inspect.isclass(value)
    ),
}
"""The sections of `innerloop.optim`; an object belongs to the first that takes it."""


def section(value: object) -> str:
    """Return the section of an object, ``rest`` if none takes it."""
    return next((name for name, takes in SECTIONS.items() if takes(value)), "rest")


def described(module: str, wanted: str | None) -> Iterator[Entry]:
    """Find what the page of a module describes, in the order of the page.

    An object that the top level exports beside a package of its own (`innerloop.StoreAll`, which is
    `innerloop.strategy.StoreAll`) stands on the page of the package.
    """

    def belongs(entry: Entry) -> bool:
        names = (entry.name, *entry.others)
        pages = [name.rpartition(".")[0] for name in names]
        inner = [page for page in pages if page != "innerloop"]
        return (inner or pages)[0] == module

    chosen = [
        entry
        for entry in ENTRIES
        if belongs(entry) and (wanted is None or section(entry.value) == wanted)
    ]

    def place(entry: Entry) -> tuple[int, str]:
        name = entry.name.rpartition(".")[2]
        return FIRST.index(name) if name in FIRST else len(FIRST), name.lower()

    return iter(sorted(chosen, key=place))


def members(value: type) -> list[str]:
    """Write the options that choose which members of a class are described."""
    name = value.__name__
    if name in MEMBERS or is_state(value):
        chosen = ", ".join(MEMBERS.get(name, ()))
        return [f"   :members: {chosen}"] if chosen else []
    return ["   :members:", f"   :exclude-members: {', '.join(NEVER)}"]


def directive(entry: Entry) -> str:
    """Write the autodoc directive of one object."""
    name, value = entry.name.rpartition(".")[2], entry.value
    if inspect.isclass(value) and not name.islower():
        kind = "exception" if issubclass(value, BaseException) else "class"
        options = members(value)
    else:
        kind, options = ("function" if callable(value) else "data"), []
    return "\n".join([f".. auto{kind}:: {entry.name}", *options, ""])


def written(match: re.Match[str]) -> str:
    """Replace one ``.. public::`` line by the directives it stands for."""
    module, wanted = match["module"], match["section"]
    head = [f".. currentmodule:: {module}", ""]
    if wanted in (None, "rest") and module not in SPLIT:
        head = [f".. automodule:: {module}", "", *head]
    return "\n".join([*head, *map(directive, described(module, wanted))])


SPLIT = ("innerloop.optim",)
"""Modules in several sections: their page writes the directive of the module itself."""


def table_of_operations() -> str:
    """Write the catalogue of operations as a Markdown table."""
    rows = [
        (f"`{operation.name}`", operation.reason, operation.instead)
        for operation in getattr(_catalogue, "OPERATIONS", ())
    ]
    header = ("operation", "what PyTorch lacks or gets wrong", "what to write instead")
    return "\n".join(markdown(header, rows)) if rows else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Write a table, line by line."""
    for place, row in enumerate([header, *rows]):
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
        if place == 0:
            yield "|" + "---|" * len(header)


def write_reference(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fill in what a page asks for (event ``source-read``)."""
    if docname.startswith("api/"):
        text = re.sub(
            r"^\.\. public:: (?P<module>[\w.]+)(?: (?P<section>\w+))?$",
            written,
            source[0],
            flags=re.M,
        )
        source[0] = text.replace("{{ operations }}", table_of_operations())


def mention_other_names(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Close the description of an object with its other names."""
    if OTHERS.get(name):
        others = ", ".join(f"``{other}``" for other in OTHERS[name])
        lines += ["", f"Other names: {others}.", ""]


def lead_other_names_there(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Let references to every name of an object arrive at its one description."""
    objects = env.domains.python_domain.objects
    for name, others in OTHERS.items():
        if name in objects:
            objects.update({other: objects[name]._replace(aliased=False) for other in others})
    return []


class PublicNames(PythonDomain):
    """The Python domain without the private paths that autodoc notes for resolving annotations."""

    def find_obj(
        self,
        env: BuildEnvironment,
        modname: str,
        classname: str,
        name: str,
        type: str | None,
        searchmode: int = 0,
    ) -> list[tuple[str, ObjectEntry]]:
        """Find what a reference may mean; two names of one object are no ambiguity."""
        found = super().find_obj(env, modname, classname, name, type, searchmode)
        return found[:1] if len({entry.node_id for _, entry in found}) == 1 else found

    def get_objects(self) -> Iterator[tuple[str, str, str, str, str, int]]:
        """Return what goes into ``objects.inv`` and into the search."""
        return (found for found in super().get_objects() if "._" not in found[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_domain(PublicNames, override=True)
    app.connect("source-read", write_reference)
    app.connect("autodoc-process-docstring", mention_other_names)
    app.connect("env-updated", lead_other_names_there)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
