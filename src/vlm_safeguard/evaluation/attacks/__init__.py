"""Adaptive attacks: adversarial images and texts, made against a model with its defence at work."""
