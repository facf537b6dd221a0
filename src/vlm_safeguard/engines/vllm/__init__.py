"""The guard around vLLM's own engine: open requests are answered from their text alone.

Nothing in a worker is changed. The text-only view of a request is a request of its own, and the
gate is decided from its log-probabilities; so all keys and values are those of an unmodified model,
and requests may share vLLM's prefix cache whatever was decided on them.
"""
