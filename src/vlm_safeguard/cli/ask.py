"""`vlm-safeguard ask`: one question, unguarded and guarded side by side."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from vlm_safeguard.cli.loading import AsJson, GuardName, ModelOption, console, loads_a_model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.loading import Loading, load_guard, load_image, load_model


@loads_a_model
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="An image to ask about.")] = None,
    model: ModelOption = "pocket",
    guard: GuardName = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 48,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Ask one question, with or without an image; shows both answers and the receipt.

    Without --guard one is fitted now.
    """
    if not question.strip():
        raise SafeguardError("The question is empty.")
    shown = None if image is None else load_image(image)
    screen = console(as_json)
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    from vlm_safeguard.model.backbone import model_inputs
    from vlm_safeguard.report.tables import receipt_table

    loaded, processor = load_model(model, loading)
    fitted = load_guard(guard, model, loaded, processor)
    inputs = model_inputs(loaded, processor, [question], [shown])
    answers = {}
    for name, attached in (("unguarded", nullcontext()), ("guarded", fitted.attach(loaded))):
        with attached:
            output = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers[name] = processor.decode(new, skip_special_tokens=True)
    (receipt,) = fitted.receipts
    if as_json:
        print(json.dumps({**answers, "receipt": receipt.model_dump()}))
        return
    width = max(30, screen.width // 2 - 2)
    panels = [
        Panel(Text(reply), title=name, width=width, border_style=style)
        for (name, reply), style in zip(answers.items(), ("red", "green"), strict=True)
    ]
    screen.print(Columns(panels), receipt_table(receipt))
