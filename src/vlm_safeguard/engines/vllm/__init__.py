"""The guard around vLLM's own engine: open requests are answered from their text, or edited.

The text-only view of a request is a request of its own. The gate is decided from its
log-probabilities and, where it reads states, from what a subclass of vLLM's worker read of it.
Where nothing is edited all keys and values are those of an unmodified model, and requests may share
vLLM's prefix cache whatever was decided on them; an edited request shares with none.

Data flows so: `client` (or `offline`) asks a `question`, whose `marks` tell `worker` what to read
(`passes`, `layers`); `states` puts that together, and `verdict` decides by the policy. An open
request that is edited goes in with an `edit_plan` (`edit_passes`, `edited_layers`).
"""
