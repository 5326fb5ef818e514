"""What the import hook of ``conftest.py`` puts around every function of the package."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(
    conf=BeartypeConf(is_pep484_tower=True)
)  # as for a static type checker, an int will do for a float
