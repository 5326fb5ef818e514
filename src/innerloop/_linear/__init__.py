"""Second derivatives as linear operators."""
