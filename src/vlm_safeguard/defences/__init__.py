"""Defences to compare: the guard's own variants here, baselines one file each."""
