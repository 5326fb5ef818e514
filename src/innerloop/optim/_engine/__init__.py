"""What update rules are built from."""
