"""A page that shows one request answered without the guard and under it, side by side."""
