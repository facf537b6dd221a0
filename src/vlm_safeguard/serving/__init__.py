"""The OpenAI-compatible server of a guarded model."""
