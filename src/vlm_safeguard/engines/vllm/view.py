"""A request as vLLM rendered it: its text-only view, checked against where vLLM put the media."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.request import Request, read_request


def read_rendered(
    policy: Policy, prompt: Sequence[int], ranges: Iterable[tuple[int, int]]
) -> Request:
    """Read a prompt whose media are expanded.

    The policy knows media by their tokens, vLLM by where it put them; on an unmodified model of the
    policy's family both are the same, and what one of them alone takes for a medium is refused.

    Args:
        prompt: token ids.
        ranges: (start, stop) of each medium's tokens, as vLLM placed them.

    Raises:
        ValueError: they differ, or the prompt cannot be judged.
        SafeguardError: it holds a medium whose text-only view is not known.
    """
    view, placed = policy.text_view, sorted(ranges)
    media = view.located(prompt)
    inside = {position for start, stop in placed for position in range(start, stop)}
    stray = [
        position
        for position, token in enumerate(prompt)
        if token in view.placeholder_ids and position not in inside
    ]
    if stray:
        raise ValueError(
            f"token {stray[0]} of the prompt stands for a medium, and no medium was placed there; "
            "leave the placeholder out of the text"
        )
    for start, stop in placed:
        around = [medium for medium in media if medium.start <= start and stop <= medium.stop]
        if not around or view.placeholder_ids.isdisjoint(prompt[start:stop]):
            raise ValueError(
                f"a medium was placed at tokens {start}–{stop - 1} of the prompt, where the guard "
                "reads none"
            )
    for medium in media:
        if not any(medium.start <= start < medium.stop for start, _ in placed):
            raise ValueError(
                f"tokens {medium.start}–{medium.stop - 1} of the prompt read as a medium, and none "
                "was placed there"
            )
    return read_request(policy, prompt)
