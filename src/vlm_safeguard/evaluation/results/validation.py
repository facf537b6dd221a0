"""What is wrong in a file, in one sentence."""

from __future__ import annotations

from pydantic import ValidationError


def first_error(error: Exception) -> str:
    """The first thing that pydantic says is wrong and where; another error's own words."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    return str(error)
