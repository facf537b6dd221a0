"""Results as figures, a kind of figure a file."""
