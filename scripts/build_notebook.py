"""Make the notebooks of ``examples/`` from ``scripts/*_notebook.py``: split, execute, save with
their outputs.

A source is a Python file in the percent format: ``# %%`` begins a code cell, ``# %% [markdown]``
a text cell whose lines are comments. What stands before the first cell belongs to the file, not to
the notebook.

    python scripts/build_notebook.py                # all of them
    python scripts/build_notebook.py walkthrough    # one
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {
    ROOT / "examples" / f"{name}.ipynb": ROOT / "scripts" / f"{name}_notebook.py"
    for name in ("walkthrough", "meta_policy")
}
"""Notebooks, and the source of each."""
NOTEBOOK, SOURCE = next(iter(NOTEBOOKS.items()))
MARK, TEXT = "# %%", "[markdown]"


def cells(source: str) -> list[tuple[str, str]]:
    """The ("code" or "markdown", text) pairs of a source in the percent format."""
    found = []
    for part in source.split(f"\n{MARK}")[1:]:
        kind, _, body = part.partition("\n")
        if kind.strip() == TEXT:
            lines = (
                line.removeprefix("#").removeprefix(" ") for line in body.strip("\n").split("\n")
            )
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip("\n")))
    return found


def unexecuted(source: str) -> NotebookNode:
    """The notebook without outputs. Cell ids are numbers, so that building it twice gives the same
    file.
    """
    make = {"code": new_code_cell, "markdown": new_markdown_cell}
    content = [
        make[kind](text, id=f"cell-{number}") for number, (kind, text) in enumerate(cells(source))
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(
        cells=content, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}
    )


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run every cell in a fresh kernel; an exception in a cell is an exception here."""
    metadata = dict(notebook.metadata)
    NotebookClient(notebook, timeout=300, record_timing=False).execute(cwd=str(NOTEBOOK.parent))
    notebook.metadata = (
        metadata  # the kernel adds its exact version, which would differ from machine to machine
    )
    return notebook


def main() -> None:
    """Build the notebooks and overwrite the stored ones."""
    for path, source in NOTEBOOKS.items():
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        notebook = execute(unexecuted(source.read_text(encoding="utf-8")))
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()
