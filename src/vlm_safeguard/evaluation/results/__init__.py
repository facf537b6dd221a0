"""What is kept and counted: every file's format, once."""
