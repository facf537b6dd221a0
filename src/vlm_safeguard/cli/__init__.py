"""The command line: one file a command."""

from __future__ import annotations

import sys

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.extras import require


def main() -> None:
    """Entry point: an error the user can mend is one sentence and exit code 1."""
    try:
        require("cli", "rich", "typer")
        from vlm_safeguard.cli.app import app

        app()
    except SafeguardError as error:
        print(f"vlm-safeguard: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("vlm-safeguard: interrupted.", file=sys.stderr)
        sys.exit(130)
