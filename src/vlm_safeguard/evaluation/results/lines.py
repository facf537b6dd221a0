"""`samples.jsonl`: one line an answer."""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]
