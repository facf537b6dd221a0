"""What is decided and done: frozen data and pure functions."""
