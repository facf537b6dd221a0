"""Defences to compare, one file each, behind one door: the guard, its variants, and baselines."""
