"""One gradient of the inner loss."""
