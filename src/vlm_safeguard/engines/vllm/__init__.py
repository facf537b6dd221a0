"""The guard around vLLM's own engine: open requests are answered from their text alone.

The text-only view of a request is a request of its own. The gate is decided from its
log-probabilities and, where it reads states, from what a subclass of vLLM's worker read of it.
Workers read and change nothing, so all keys and values are those of an unmodified model, and
requests may share vLLM's prefix cache whatever was decided on them.

Data flows so: `client` (or `offline`) asks a `question`, whose `marks` tell `worker`, `passes` and
`layers` what to read; `states` puts that together, and `verdict` decides by the policy.
"""
