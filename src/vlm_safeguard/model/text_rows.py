"""Token ids as a left-padded batch for `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm_safeguard.model.backbone import Backbone


def text_rows(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    begun: Sequence[Sequence[int]],
    *,
    pad: int,
    width: int | None = None,
) -> dict[str, torch.Tensor]:
    """Prompts of token ids, and what their answers begin with behind them, where the model is.

    Args:
        begun: token ids, for each prompt.
        pad: the token that stands in the padding.
        width: of the rows; by default that of the longest.

    Returns:
        (rows, width) `input_ids` and `attention_mask`, and what else the model tells prompts by.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, begun, strict=True)]
    wide = max(map(len, rows)) if width is None else width
    left = [wide - len(row) for row in rows]
    ids = torch.tensor([[pad] * n + row for n, row in zip(left, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * len(row) for n, row in zip(left, rows, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if backbone.bidirectional:  # 0 where a token is the prompt's, which attend both ways
        answers = [[0] * (wide - len(answer)) + [1] * len(answer) for answer in begun]
        inputs["token_type_ids"] = torch.tensor(answers)
    return {name: values.to(backbone.device) for name, values in inputs.items()}
