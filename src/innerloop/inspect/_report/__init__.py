"""Reports: what was found about a training, as one page for a browser."""
