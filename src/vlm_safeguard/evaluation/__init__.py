"""Measuring: prompts, image conditions, judges, metrics, and the runner that puts them together."""
