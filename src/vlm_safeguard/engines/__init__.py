"""Engines: what runs a model under a policy. One folder each."""
