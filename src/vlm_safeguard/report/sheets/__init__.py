"""Results as tables, arranged once for HTML, Markdown and CSV."""
