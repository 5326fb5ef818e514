"""A module at other parameters than its own."""
