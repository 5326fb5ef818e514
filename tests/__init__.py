"""The test suite. Oracles (where truth comes from) are in ``oracles.py``, the list of optimizers
under test in ``optimizers.py``."""
