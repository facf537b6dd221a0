"""Random calls of a guarded model: what each may be, and what has to hold of all of them."""
