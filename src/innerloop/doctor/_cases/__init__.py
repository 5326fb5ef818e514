"""The operations under audit, one file per family."""
