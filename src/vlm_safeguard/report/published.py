"""Published figures, shown beside ours only where the model is the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One number that a paper reports.

    Attributes:
        model: Hub id of the model that it was measured on.
        benchmark: our name of it; "jailbreak" is ours in the paper's form, not its prompts.
        conditions: the image conditions of ours that it may be: more than one where the paper's
            text does not say which.
        ours: the defence of ours that stands beside it.
        value: share, 0–1.
        about: whether the number was read as "about".
    """

    source: str
    model: str
    benchmark: str
    conditions: tuple[str, ...]
    defence: str
    ours: str
    metric: str
    value: float
    about: bool = False


_LLAVA = "llava-hf/llava-1.5-7b-hf"
_VLM_GUARD = "VLM-Guard, arXiv 2502.10486"
_SHIFTDC = "ShiftDC, arXiv 2502.13095"
_ATTACK = "attack_success"
PUBLISHED = (
    Published(_VLM_GUARD, _LLAVA, "malicious_instruct", ("text",), "none", "none", _ATTACK, 0.15),
    Published(_VLM_GUARD, _LLAVA, "malicious_instruct", ("blank",), "none", "none", _ATTACK, 0.34),
    Published(
        _VLM_GUARD,
        _LLAVA,
        "jailbreak",
        ("text", "blank"),
        "none",
        "none",
        _ATTACK,
        0.16,
        about=True,
    ),
    Published(
        _VLM_GUARD,
        _LLAVA,
        "jailbreak",
        ("text", "blank"),
        "VLM-Guard",
        "default",
        _ATTACK,
        0.01,
        about=True,
    ),
    Published(_SHIFTDC, _LLAVA, "mm_safetybench_sd_typo", ("own",), "none", "none", _ATTACK, 0.705),
    Published(
        _SHIFTDC, _LLAVA, "mm_safetybench_sd_typo", ("own",), "ShiftDC", "shiftdc", _ATTACK, 0.436
    ),
    Published(_SHIFTDC, _LLAVA, "figstep", ("own",), "none", "none", _ATTACK, 0.524),
    Published(_SHIFTDC, _LLAVA, "figstep", ("own",), "ShiftDC", "shiftdc", _ATTACK, 0.132),
)


def published_for(model: str) -> list[Published]:
    """What was published on exactly this model."""
    return [figure for figure in PUBLISHED if figure.model == model]
