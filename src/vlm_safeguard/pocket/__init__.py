"""The Pocket VLM: a small, real LLaVA to see the guard at work on, with no model hub."""
