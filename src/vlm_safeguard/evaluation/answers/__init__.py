"""How answers are made: inspect-ai's provider, batches, messages."""
