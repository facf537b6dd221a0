"""The recipes that trained the reference VLMs, one file for each step."""
