"""What strategies are built from; users never choose among these."""
