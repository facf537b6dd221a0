"""Fitting a guard: what it is fitted on, and the policy that follows from it."""
