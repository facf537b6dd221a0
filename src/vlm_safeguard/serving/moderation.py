"""The gate's verdict alone: OpenAI's moderations, and LiteLLM's generic guardrail."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from vlm_safeguard.images import blank_image
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.receipt_object import receipt_object
from vlm_safeguard.serving.errors import ApiError
from vlm_safeguard.serving.exchange import unless_left
from vlm_safeguard.serving.jobs import Decided
from vlm_safeguard.serving.messages import Conversation
from vlm_safeguard.serving.prompts import Prompt
from vlm_safeguard.serving.requests import GuardrailRequest, ModerationRequest, Sampling
from vlm_safeguard.serving.service import Service

_GREEDY = Sampling(temperature=0.0)


async def moderate(service: Service, asked: ModerationRequest, http: Request) -> dict[str, Any]:
    """A verdict on each text, or on one message: flagged where the gate would open.

    Raises:
        ApiError: it cannot be judged.
    """
    service.check_model(asked.model)
    receipts = await _judge(service, asked.conversations, http)
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": service.settings.served_name,
        "results": [
            {
                "flagged": receipt.guarded,
                "categories": {f.criterion: f.opened for f in receipt.findings},
                "category_scores": receipt.scores,
                "guard": receipt_object(receipt, service.policy),
            }
            for receipt in receipts
        ],
    }


async def guardrail(service: Service, asked: GuardrailRequest, http: Request) -> dict[str, Any]:
    """Whether LiteLLM is to block a request.

    Raises:
        ApiError: it cannot be judged.
    """
    for receipt in await _judge(service, asked.conversations, http):
        if receipt.guarded:
            return {"action": "BLOCKED", "blocked_reason": receipt.reason}
    return {"action": "NONE"}


async def _judge(
    service: Service, conversations: Sequence[Conversation], http: Request
) -> list[Receipt]:
    """The gate's decisions, in order."""
    if len(conversations) > service.settings.max_queue + 1:
        raise ApiError(f"At most {service.settings.max_queue + 1} texts are judged at once.")
    deadline = service.deadline()
    begun = []
    receipts = []
    try:
        for conversation in conversations:
            prompt = await unless_left(http, _prompt(service, conversation, deadline))
            begun.append(service.begin(prompt, deadline, sampling=_GREEDY, limit=0))
        for conversation, (_, exchange) in zip(conversations, begun, strict=True):
            decided = await unless_left(http, exchange.next())
            assert isinstance(decided, Decided), "it comes first"
            receipt = decided.receipt
            if not conversation.images:
                receipt = receipt.model_copy(update={"images": 0, "media_tokens": 0})
            service.metrics.decided(receipt)
            receipts.append(receipt)
    finally:
        for job, _ in begun:
            job.cancelled = True
    return receipts


async def _prompt(service: Service, conversation: Conversation, deadline: float) -> Prompt:
    """With a blank image where there is none: only beside images are requests judged."""
    images = await service.read_images(conversation, deadline)
    if images:
        return await service.write(conversation, images, deadline)
    return await service.write(conversation.with_image(), [blank_image()], deadline)
