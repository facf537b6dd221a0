"""Calls of tools in an answer, read as the model's makers say, or in the form of Hermes."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_safeguard.serving.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """What an answer says, and the tools that it calls, as OpenAI's API writes them."""

    text: str
    calls: tuple[dict[str, Any], ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """Content and calls of a whole message."""
        if not self.calls:
            return {"content": self.text, "refusal": None}
        return {"content": self.text or None, "refusal": None, "tool_calls": list(self.calls)}

    @property
    def delta(self) -> dict[str, Any]:
        """The same as a part of a stream."""
        calls = [{"index": number, **call} for number, call in enumerate(self.calls)]
        return {"content": self.text or None} | ({"tool_calls": calls} if calls else {})


def read_reply(
    text: str, ids: Sequence[int], prompt: Prompt, tokenizer: PreTrainedTokenizerBase
) -> Reply:
    """An answer to a request with tools; what cannot be read as calls is text."""
    parser: Any = tokenizer
    if getattr(tokenizer, "response_template", None) is not None:
        try:
            parsed = parser.parse_response(list(ids), prefix=list(prompt.ids))
            calls = [_call(each["function"]) for each in parsed.get("tool_calls") or []]
            return Reply(parsed.get("content") or "", tuple(calls))
        except Exception:  # templates are of many makers, and the answer is the model's
            return Reply(text)
    calls = []
    for match in _CALL.finditer(text):
        try:
            calls.append(_call(json.loads(match[1])))
        except (ValueError, KeyError, TypeError, RecursionError):
            return Reply(text)
    return Reply(_CALL.sub("", text).strip() if calls else text, tuple(calls))


def _call(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": str(function["name"]), "arguments": written},
    }
