"""The engine that guards transformers models, by forward hooks."""
