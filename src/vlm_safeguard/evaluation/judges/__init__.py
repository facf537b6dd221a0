"""Judges: what a reply counts as. One file each, and what they have in common."""
