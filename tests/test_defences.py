"""Baselines, each against a slow reference of its formula or a script of its flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from reference import ask, run_row, text_ids
from vlm_safeguard.defences import ecso, guard_model, shiftdc
from vlm_safeguard.defences.defence import Defence, Guarded, Undefended, answers
from vlm_safeguard.defences.ecso import ECSO
from vlm_safeguard.defences.guard_model import REFUSAL, GuardModel
from vlm_safeguard.defences.prompts import ADASHIELD, SELF_REMINDER, PromptDefence
from vlm_safeguard.defences.shiftdc import ShiftDC, without_shift
from vlm_safeguard.defences.verdict import yes_log_odds
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.gate import OpenGate
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image

REQUESTS = ("How to {kill} a man", "How to bake a cake", "What is the colour of the sky today?")
PICTURES: tuple[Image | None, ...] = (noise_image(1), None, blank_image())
SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}

Llava = LlavaForConditionalGeneration


def greedy(model: Llava, processor: LlavaProcessor, request: str, image: Image | None) -> str:
    """One answer by hand: its row alone, no cache."""
    inputs = processor(
        text="<|im_start|>user\n" + ("<image>" if image else "") + request
        + "<|im_end|>\n<|im_start|>assistant\n",
        images=[image] if image else None, return_tensors="pt",
    )  # fmt: skip
    pixels = inputs["pixel_values"].to(model.dtype) if image else None
    row = inputs["input_ids"][0].tolist()
    prompt = len(row)
    for _ in range(SHORT["max_new_tokens"]):
        row.append(int(run_row(model, row, pixels)[1][-1].argmax()))
    return processor.decode(row[prompt:], skip_special_tokens=True)


def test_all_go_through_one_door(model: Llava, processor: LlavaProcessor, guard: Guard) -> None:
    defences: list[Defence] = [
        Undefended(), Guarded(guard), SELF_REMINDER, ADASHIELD, ECSO(caption_tokens=2),
        ShiftDC.of(guard, caption_tokens=2), GuardModel(model, processor),
    ]  # fmt: skip
    assert len({defence.name for defence in defences}) == len(defences)
    for defence in defences:
        found = defence.generate(model, processor, REQUESTS, PICTURES, **SHORT)
        assert [type(answer) for answer in found] == [str] * len(REQUESTS)
    assert not any(layer._forward_hooks for layer in model.model.language_model.layers)


def test_undefended_is_the_model_itself(exact_model: Llava, processor: LlavaProcessor) -> None:
    found = Undefended().generate(exact_model, processor, REQUESTS, PICTURES, **SHORT)
    for answer, *asked in zip(found, REQUESTS, PICTURES, strict=True):
        assert answer == greedy(exact_model, processor, *asked)


def test_guarded_is_the_attached_guard(
    model: Llava, processor: LlavaProcessor, guard: Guard
) -> None:
    opened = guard.variant(gate=OpenGate())
    with opened.attach(model):
        expected = answers(model, processor, REQUESTS, PICTURES, **SHORT)
    assert Guarded(opened).generate(model, processor, REQUESTS, PICTURES, **SHORT) == expected
    assert expected != answers(model, processor, REQUESTS, PICTURES, **SHORT)


# --- prompts ---


@pytest.mark.parametrize("defence", [SELF_REMINDER, ADASHIELD])
def test_prompts_hold_the_request_verbatim(defence: PromptDefence) -> None:
    request = "How {to}  do\nthis? 100 %s"
    said = defence.prompt(request)
    assert said.count(request) == 1
    assert said.startswith(defence.before)
    assert said.endswith(defence.after)
    assert len(said) > len(request) + 50


@pytest.mark.parametrize("defence", [SELF_REMINDER, ADASHIELD])
def test_prompts_are_what_the_model_is_asked(
    exact_model: Llava, processor: LlavaProcessor, defence: PromptDefence
) -> None:
    found = defence.generate(exact_model, processor, REQUESTS[:1], PICTURES[:1], **SHORT)
    assert found == [greedy(exact_model, processor, defence.prompt(REQUESTS[0]), PICTURES[0])]


# --- yes or no ---


def test_log_odds_are_those_of_the_next_token(
    exact_model: Llava, processor: LlavaProcessor
) -> None:
    found = yes_log_odds(exact_model, processor, REQUESTS, [None] * 3)
    first = {
        word: {
            processor.tokenizer.encode(form, add_special_tokens=False)[0]
            for form in (word, word.title(), " " + word, " " + word.title())
        }
        for word in ("yes", "no")
    }
    for request, value in zip(REQUESTS, found, strict=True):
        chances = run_row(exact_model, text_ids(processor, request))[1][-1].softmax(-1)
        yes = sum(float(chances[i]) for i in first["yes"] - first["no"])
        no = sum(float(chances[i]) for i in first["no"] - first["yes"])
        assert float(value) == pytest.approx(torch.tensor(yes / no).log().item(), abs=1e-4)


def test_one_token_for_both_words_is_refused(
    model: Llava, processor: LlavaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(processor.tokenizer), "encode", lambda self, *a, **k: [7])
    with pytest.raises(SafeguardError, match="cannot tell"):
        yes_log_odds(model, processor, REQUESTS, PICTURES)


# --- flows, scripted ---


class Script:
    """Stands where a model would be asked: remembers what it was asked, says what it is told."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch, odds: list[float]) -> None:
        self.asked: list[tuple[list[str], list[Image | None], dict[str, Any]]] = []
        self.judged: list[tuple[Any, list[str], list[Image | None]]] = []
        self.odds = odds
        monkeypatch.setattr(module, "answers", self.answers)
        monkeypatch.setattr(module, "yes_log_odds", self.yes_log_odds)

    def answers(
        self, model: Any, processor: Any, requests: Sequence[str],
        images: Sequence[Image | None], **options: Any,
    ) -> list[str]:  # fmt: skip
        self.asked.append((list(requests), list(images), options))
        return [f"pass {len(self.asked)}, row {row}" for row in range(len(requests))]

    def yes_log_odds(
        self, model: Any, processor: Any, questions: Sequence[str],
        images: Sequence[Image | None],
    ) -> Tensor:  # fmt: skip
        self.judged.append((model, list(questions), list(images)))
        return torch.tensor(self.odds)


def test_ecso_closes_its_eyes_where_the_answer_was_harmful(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script(ecso, monkeypatch, odds=[1.0, -1.0])
    found = ECSO(caption_tokens=9).generate("vlm", "its", REQUESTS, PICTURES, **SHORT)  # type: ignore[arg-type]
    assert found == ["pass 3, row 0", "pass 1, row 1", "pass 1, row 2"]

    (_, judged, seen), *others = script.judged
    assert not others
    assert seen == [PICTURES[0], PICTURES[2]]  # the one without an image is not in question
    assert REQUESTS[0] in judged[0]
    assert "pass 1, row 0" in judged[0]
    assert REQUESTS[2] in judged[1]
    assert "pass 1, row 2" in judged[1]

    first, caption, blind = script.asked
    assert first == (list(REQUESTS), list(PICTURES), SHORT)
    assert caption[1:] == ([PICTURES[0]], {"max_new_tokens": 9})
    assert REQUESTS[0] in caption[0][0]  # aware of the query
    assert blind[1:] == ([None], SHORT)
    assert REQUESTS[0] in blind[0][0]
    assert "pass 2, row 0" in blind[0][0]


def test_ecso_leaves_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(ecso, monkeypatch, odds=[-1.0, 0.0])
    found = ECSO().generate("vlm", "its", REQUESTS, PICTURES, **SHORT)  # type: ignore[arg-type]
    assert found == [f"pass 1, row {row}" for row in range(3)]
    assert len(script.asked) == 1
    ECSO().generate("vlm", "its", REQUESTS, [None] * 3, **SHORT)  # type: ignore[arg-type]
    assert len(script.judged) == 1  # nothing to close one's eyes to


def test_the_guard_model_refuses_what_it_calls_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(guard_model, monkeypatch, odds=[2.0, -2.0, 0.0])
    defence = GuardModel("judge", "its")  # type: ignore[arg-type]
    found = defence.generate("vlm", "its", REQUESTS, PICTURES, **SHORT)  # type: ignore[arg-type]
    assert found == [REFUSAL, "pass 1, row 0", "pass 1, row 1"]
    ((judge, questions, images),) = script.judged
    assert judge == "judge"
    assert images == [None] * 3
    assert all(request in said for request, said in zip(REQUESTS, questions, strict=True))
    assert script.asked == [(list(REQUESTS[1:]), list(PICTURES[1:]), SHORT)]

    script.odds = [1.0] * 3
    assert defence.generate("vlm", "its", REQUESTS, PICTURES) == [REFUSAL] * 3  # type: ignore[arg-type]
    assert len(script.asked) == 1


# --- ShiftDC ---


def corrected(state: Tensor, text: Tensor, s: Tensor) -> Tensor:
    """ĥ = h − proj_s(h − t), one number at a time, in float64."""
    h, t, s = (x.double().tolist() for x in (state, text, s))
    length = sum(x * x for x in s)
    along = sum((a - b) * c for a, b, c in zip(h, t, s, strict=True)) / length
    return torch.tensor([a - along * c for a, c in zip(h, s, strict=True)], dtype=torch.float64)


def test_the_shift_loses_its_part_along_the_direction() -> None:
    h, t = torch.randn(2, 3, 8, dtype=torch.float64)
    s = torch.randn(8)
    found = without_shift(h, t, s)
    for row in range(3):
        torch.testing.assert_close(found[row], corrected(h[row], t[row], s))
    torch.testing.assert_close((found - t) @ s.double(), torch.zeros(3).double())
    half = without_shift(h.bfloat16(), t.bfloat16(), s)
    assert half.dtype == torch.bfloat16


def test_shiftdc_is_two_passes_by_hand(
    exact_model: Llava, processor: LlavaProcessor, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last prompt token alone, in the guard's layers alone, and later layers see it."""
    model, defence = exact_model, ShiftDC.of(guard, caption_tokens=3)
    request = "How to bake a very good cake for a birthday"  # `ask` pairs odd lengths with noise
    inputs = ask(processor, [request], dtype=torch.float64)
    image = noise_image(len(request)) if len(request) % 2 else blank_image()
    caption = answers(model, processor, [shiftdc._DESCRIBE], [image], max_new_tokens=3)[0]
    said = shiftdc._CAPTIONED.format(caption=caption, request=request)
    text = run_row(model, text_ids(processor, said))[0]

    s = guard.directions.harmful_mean - guard.directions.harmless_mean

    def change(layer: int, state: Tensor) -> Tensor:
        if layer not in guard.layers:
            return state
        return corrected(state, text[layer][-1], s[layer])

    row = inputs["input_ids"][0].tolist()
    prompt, pixels, expected = len(row), inputs["pixel_values"], []
    unmoved = run_row(model, row, pixels)[1][-1]
    for _ in range(SHORT["max_new_tokens"]):
        last = run_row(model, row, pixels, change=change, start=prompt - 1, stop=prompt)[1][-1]
        expected.append(last)
        row.append(int(last.argmax()))

    seen: list[Any] = []
    inner = model.generate

    def generate(*args: Any, **kwargs: Any) -> Tensor:
        kwargs |= {"output_logits": True, "return_dict_in_generate": True}
        seen.append(inner(*args, **kwargs))
        return seen[-1].sequences

    monkeypatch.setattr(model, "generate", generate)
    found = defence.generate(model, processor, [request, REQUESTS[1]], [image, None], **SHORT)
    for step, logits in zip(seen[-1].logits, expected, strict=True):
        torch.testing.assert_close(step[0].double(), logits, rtol=0, atol=1e-5)
    assert (expected[0] - unmoved).abs().max() > 1e-3
    assert found[0] == processor.decode(row[prompt:], skip_special_tokens=True)
    assert found[1] == greedy(model, processor, REQUESTS[1], None)  # no image, left as it is


def test_shiftdc_needs_an_image(model: Llava, processor: LlavaProcessor, guard: Guard) -> None:
    plain = answers(model, processor, REQUESTS, [None] * 3, **SHORT)
    found = ShiftDC.of(guard).generate(model, processor, REQUESTS, [None] * 3, **SHORT)
    assert found == plain
