"""Scripts that join the parts."""
