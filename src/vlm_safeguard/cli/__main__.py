"""`python -m vlm_safeguard.cli`."""

from vlm_safeguard.cli import main

main()
