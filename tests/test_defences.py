"""Baselines, each against a slow reference of its formula or a script of its flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import Change, run_row, text_ids, with_thresholds
from vlm_safeguard.defences import ecso, guard_model, prompts, shiftdc
from vlm_safeguard.defences.canned import Canned
from vlm_safeguard.defences.cmrm import CMRM
from vlm_safeguard.defences.defence import Answer, Defence, generate_answers
from vlm_safeguard.defences.ecso import ECSO
from vlm_safeguard.defences.guard_model import REFUSAL, GuardModel
from vlm_safeguard.defences.guarded import Guarded
from vlm_safeguard.defences.inferaligner import InferAligner
from vlm_safeguard.defences.prompts import (
    ADASHIELD,
    GOAL_PRIORITY,
    NONE,
    SELF_REMINDER,
    PromptDefence,
)
from vlm_safeguard.defences.shiftdc import ShiftDC, without_shift
from vlm_safeguard.defences.steering import adding, steered
from vlm_safeguard.defences.table import NAMES, defences
from vlm_safeguard.defences.variants import tuned, variants
from vlm_safeguard.defences.verdict import yes_log_odds
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import (
    Chat,
    Turn,
    chat_of,
    images_of,
    rephrased,
    request_text,
    unseen,
)
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.soundness import check_sound

REQUESTS = ("How to {kill} a man", "How to bake a cake", "What is the colour of the sky today?")
PICTURES: tuple[Image | None, ...] = (noise_image(1), None, blank_image())
CHATS = tuple(
    chat_of(request, *([image] if image else []))
    for request, image in zip(REQUESTS, PICTURES, strict=True)
)
#: A system turn, an earlier turn with a picture, and two pictures among the request's words.
TALK: Chat = (
    Turn("system", ("Answer briefly.",)),
    Turn("user", (noise_image(3), "What is it?")),
    Turn("assistant", ("Noise.",)),
    Turn("user", (noise_image(5), "And this,", blank_image(), "beside it?")),
)
ASKED, JUDGE = VLM("vlm", "its"), VLM("judge", "its")  # type: ignore[arg-type]
SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}

Llava = LlavaForConditionalGeneration


def by_hand(model: Llava, processor: LlavaProcessor, chat: Chat) -> tuple[list[int], Tensor | None]:
    """Token ids and pixels of one conversation, written out turn by turn."""
    written, shown = "", []
    for turn in chat:
        written += f"<|im_start|>{turn.role}\n"
        for part in turn.content:
            if isinstance(part, str):
                written += part
            else:
                written += "<image>"
                shown.append(part)
        written += "<|im_end|>\n"
    inputs = processor(
        text=written + "<|im_start|>assistant\n", images=shown or None, return_tensors="pt"
    )
    pixels = inputs["pixel_values"].to(model.dtype) if shown else None
    return inputs["input_ids"][0].tolist(), pixels


def greedy(
    model: Llava, processor: LlavaProcessor, chat: Chat, change: Change | None = None
) -> Answer:
    """One answer by hand: its row alone, no cache; every token changed, if any."""
    row, pixels = by_hand(model, processor, chat)
    prompt = len(row)
    for _ in range(SHORT["max_new_tokens"]):
        row.append(int(run_row(model, row, pixels, change=change)[1][-1].argmax()))
    return Answer(processor.decode(row[prompt:], skip_special_tokens=True), len(row) - prompt)


def with_logits(
    monkeypatch: pytest.MonkeyPatch,
    model: Llava,
    defence: Defence,
    processor: LlavaProcessor,
    chats: Sequence[Chat],
    **options: Any,
) -> tuple[list[Answer], Tensor]:
    """Answers, and the (rows, tokens, vocabulary) logits of the last `generate` behind them."""
    seen: list[Any] = []
    inner = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        kwargs |= {"output_logits": True, "return_dict_in_generate": True}
        seen.append(inner(*args, **kwargs))
        return seen[-1].sequences

    monkeypatch.setattr(model, "generate", generate)
    found = defence.generate(VLM(model, processor), chats, **SHORT, **options)
    monkeypatch.undo()
    return found, torch.stack(seen[-1].logits, dim=1).double()


# --- one door, one table ---


def test_all_go_through_one_door(model: Llava, processor: LlavaProcessor, guard: Guard) -> None:
    shown = {**defences(guard), "guard model": GuardModel(VLM(model, processor), threshold=1e9)}
    shown["ecso"] = ECSO(threshold=-1e9, caption_tokens=2)  # the longest way through
    guarded = {
        "vlm-guard-project",
        "vlm-guard-add",
        "project",
        "restore",
        "refuse",
        "default",
        "text",
        "refusal",
        "text-always",
        "canned",
        "rank-1",
        "rank-8",
        "rank-full",
        "random",
        "flipped",
    }
    for name, defence in shown.items():
        assert defence.name == name
        found = defence.generate(VLM(model, processor), (*CHATS, TALK), **SHORT)
        assert [answer.receipt is not None for answer in found] == [name in guarded] * 4
        if name != "canned":
            tokens = 4 + (64 if "goal" in name else 0)
            assert [answer.tokens for answer in found] == [tokens] * 4
    assert not any(layer._forward_hooks for layer in model.model.language_model.layers)


def test_the_table_has_an_order_and_says_what_is_in_it(guard: Guard) -> None:
    assert tuple(defences(guard)) == NAMES
    assert NAMES == (
        "none",
        "self-reminder",
        "goal-priority",
        "adashield-s",
        "ecso",
        "inferaligner",
        "cmrm",
        "shiftdc",
        "canned",
        "default",
        "vlm-guard-project",
        "vlm-guard-add",
        "project",
        "restore",
        "refuse",
        "text",
        "refusal",
        "text-always",
        "rank-1",
        "rank-8",
        "rank-full",
        "random",
        "flipped",
    )
    assert list(defences(guard, ["shiftdc", "none"])) == ["shiftdc", "none"]
    with pytest.raises(SafeguardError, match=r"no defence 'nun'; there are none, self-reminder, "):
        defences(guard, ["none", "nun"])


def test_table_and_demo_share_their_variants(guard: Guard) -> None:
    assert list(variants(guard)) == ["default", "refuse"]
    shown = variants(guard, ("default", "refuse", "project"))
    assert shown["project"].policy.gate == GATES["open"]
    table = defences(guard)
    for name in set(shown) & set(table):
        defence = table[name]
        assert isinstance(defence, Guarded)
        for part in ("edit", "gate", "layers", "rank", "random_seed"):
            theirs = getattr(shown[name].policy, part)
            assert getattr(defence.guard.policy, part) == theirs, (name, part)
    assert table["flipped"].guard.policy.edit.strength == -guard.policy.edit.strength  # type: ignore[attr-defined]
    assert table["refuse"].guard.policy.edit.name == "refuse"  # type: ignore[attr-defined]


def test_a_canned_refusal_stands_in_for_open_requests_alone(
    model: Llava, processor: LlavaProcessor, guard: Guard
) -> None:
    vlm = VLM(model, processor)
    own = Guarded(guard).generate(vlm, CHATS, **SHORT)
    scores = [answer.receipt.scores.get("text_score") for answer in own if answer.receipt]
    assert scores[1] is None  # without an image
    first, last = scores[0], scores[2]
    assert first is not None
    assert last is not None
    gate = with_thresholds(guard, (first + last) / 2).policy.gate
    answers = Canned.of(guard.variant(gate=gate)).generate(vlm, CHATS, **SHORT)
    free = generate_answers(vlm, CHATS, **SHORT)
    opened = 0 if first > last else 2
    for row, (answer, plain) in enumerate(zip(answers, free, strict=True)):
        if row == opened:
            assert (answer.text, answer.tokens) == (REFUSAL, 0)
        else:
            assert (answer.text, answer.tokens) == (plain.text, plain.tokens)


def test_the_whole_space_holds_the_directions_first(guard: Guard) -> None:
    made = guard.policy.directions
    whole = variants(guard, ["rank-full"])["rank-full"].policy
    check_sound(whole)
    assert whole.rank == made.vectors.shape[2]
    assert torch.equal(whole.directions.vectors[:, : made.rank], made.vectors)


def test_a_setting_that_decides_nothing_cannot_be_moved(guard: Guard) -> None:
    assert tuned(guard, strength=0.5).policy.edit.strength == 0.5
    with pytest.raises(SafeguardError, match="edits nothing, so there is no strength"):
        tuned(guard.variant(response=Response.TEXT), strength=0.5)
    with pytest.raises(SafeguardError, match="has no threshold to move"):
        tuned(guard.variant(gate=GATES["open"]), threshold=0.5)


def test_without_words_it_is_the_model_itself(
    exact_model: Llava, processor: LlavaProcessor
) -> None:
    found = NONE.generate(VLM(exact_model, processor), (*CHATS, TALK), **SHORT)
    assert found == [greedy(exact_model, processor, chat) for chat in (*CHATS, TALK)]


def test_guarded_is_the_attached_guard_with_its_receipts(
    model: Llava, processor: LlavaProcessor, guard: Guard
) -> None:
    opened = guard.variant(gate=GATES["open"])
    with opened.attach(model):
        expected = generate_answers(VLM(model, processor), (*CHATS, TALK), **SHORT)
    found = Guarded(opened).generate(VLM(model, processor), (*CHATS, TALK), **SHORT)
    assert [(a.text, a.tokens) for a in found] == [(a.text, a.tokens) for a in expected]
    assert [a.text for a in found] != [
        a.text for a in generate_answers(VLM(model, processor), CHATS, **SHORT)
    ]
    receipts = [answer.receipt for answer in found]
    assert receipts == opened.receipts
    assert [receipt.images for receipt in receipts if receipt] == [1, 0, 1, 3]

    beams = Guarded(opened).generate(VLM(model, processor), CHATS, num_beams=2, **SHORT)
    assert [a.receipt.images for a in beams if a.receipt] == [1, 0, 1]


def test_an_answer_ends_where_the_model_ends_it(model: Llava, processor: LlavaProcessor) -> None:
    """Rows of a batch end at different places; padding is not counted."""
    free = generate_answers(VLM(model, processor), CHATS, max_new_tokens=6)
    ids = [processor.tokenizer.encode(a.text, add_special_tokens=False) for a in free]
    end = ids[0][2]
    for options in ({"eos_token_id": end}, {"eos_token_id": [end, 1]}):
        found = generate_answers(VLM(model, processor), CHATS, max_new_tokens=6, **options)
        lengths = [row.index(end) + 1 if end in row else 6 for row in ids]
        assert [answer.tokens for answer in found] == lengths
        assert lengths[0] == 3


def test_one_answer_each(model: Llava, processor: LlavaProcessor) -> None:
    with pytest.raises(SafeguardError, match="6 answers to 3 requests"):
        generate_answers(
            VLM(model, processor), CHATS, do_sample=True, num_return_sequences=2, max_new_tokens=1
        )


# --- conversations ---


def test_the_request_is_the_last_user_turn() -> None:
    first, second, third = images_of(TALK)
    assert request_text(TALK) == "And this,\nbeside it?"
    assert rephrased(TALK, "Why?") == (*TALK[:3], Turn("user", (second, third, "Why?")))
    assert images_of(rephrased(TALK, "Why?")) == [first, second, third]
    assert images_of(unseen(TALK)) == []
    assert request_text(unseen(TALK)) == request_text(TALK)
    assert [turn.role for turn in unseen(TALK)] == [turn.role for turn in TALK]
    reply = Turn("assistant", ("Yes.",))
    assert request_text((*chat_of("Is it?"), reply)) == "Is it?"
    assert rephrased((*chat_of("Is it?"), reply), "Or?") == (*chat_of("Or?"), reply)
    for ask_of in (request_text, lambda chat: rephrased(chat, "Or?")):
        with pytest.raises(SafeguardError, match="no turn of the user"):
            ask_of((reply,))


# --- prompts ---


@pytest.mark.parametrize("defence", [SELF_REMINDER, ADASHIELD, GOAL_PRIORITY])
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
    found = defence.generate(VLM(exact_model, processor), [CHATS[0], TALK], **SHORT)
    said = defence.prompt("And this,\nbeside it?")
    talk = (*TALK[:3], Turn("user", (noise_image(5), blank_image(), said)))
    assert found == [
        greedy(exact_model, processor, chat_of(defence.prompt(REQUESTS[0]), noise_image(1))),
        greedy(exact_model, processor, talk),
    ]


def test_only_what_follows_the_thoughts_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply without an answer is given whole: nothing is lost, and nothing looks refused."""
    replies = [
        "[Internal thoughts] Harmless.\n[Final response] Bake it. [Final response] No.",
        "I cannot help.",
        "[Internal thoughts] Hm.\n[Final response] ",
    ]
    given: dict[str, Any] = {}

    def say(vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        given.update(options)
        assert all(prompts.GOAL_PRIORITY.marker in request_text(chat) for chat in chats)
        return [Answer(reply, 9) for reply in replies]

    monkeypatch.setattr(prompts, "generate_answers", say)
    found = GOAL_PRIORITY.generate(ASKED, CHATS, **SHORT)
    assert [a.text for a in found] == ["Bake it. [Final response] No.", *replies[1:]]
    assert [a.tokens for a in found] == [9] * 3
    assert given == SHORT | {"max_new_tokens": SHORT["max_new_tokens"] + GOAL_PRIORITY.thoughts}
    assert SELF_REMINDER.answer("[Final response] x") == "[Final response] x"


# --- yes or no ---


def test_log_odds_are_those_of_the_next_token(
    exact_model: Llava, processor: LlavaProcessor
) -> None:
    found = yes_log_odds(VLM(exact_model, processor), [chat_of(request) for request in REQUESTS])
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
        yes_log_odds(VLM(model, processor), CHATS)


# --- flows, scripted ---


class Script:
    """Stands where a model would be asked: remembers what it was asked, says what it is told."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch, odds: list[float]) -> None:
        self.asked: list[tuple[list[Chat], dict[str, Any]]] = []
        self.judged: list[tuple[Any, list[Chat]]] = []
        self.odds = odds
        monkeypatch.setattr(module, "generate_answers", self.answers)
        monkeypatch.setattr(module, "yes_log_odds", self.yes_log_odds)

    def answers(self, vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        self.asked.append((list(chats), options))
        return [told(len(self.asked), row) for row in range(len(chats))]

    def yes_log_odds(self, vlm: VLM, questions: Sequence[Chat]) -> Tensor:
        self.judged.append((vlm, list(questions)))
        return torch.tensor(self.odds)


def told(number: int, row: int) -> Answer:
    return Answer(f"pass {number}, row {row}", row)


def test_ecso_closes_its_eyes_where_the_answer_was_harmful(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script(ecso, monkeypatch, odds=[1.0, -1.0, 1.0])
    chats = [*CHATS, TALK]
    found = ECSO(caption_tokens=9).generate(ASKED, chats, **SHORT)
    assert found == [told(3, 0), told(1, 1), told(1, 2), told(3, 1)]

    (_, judged), *others = script.judged
    assert not others
    # the one without an image is not in question
    assert [images_of(chat) for chat in judged] == [[PICTURES[0]], [PICTURES[2]], images_of(TALK)]
    for chat, request, row in zip(
        judged, (*REQUESTS[::2], request_text(TALK)), (0, 2, 3), strict=True
    ):
        assert request in request_text(chat)
        assert f"pass 1, row {row}" in request_text(chat)

    first, caption, blind = script.asked
    assert first == (chats, SHORT)
    assert caption[1] == {"max_new_tokens": 9}
    assert [images_of(chat) for chat in caption[0]] == [[PICTURES[0]], images_of(TALK)]
    assert REQUESTS[0] in request_text(caption[0][0])  # aware of the query
    assert request_text(TALK) in request_text(caption[0][1])
    assert blind[1] == SHORT
    assert [images_of(chat) for chat in blind[0]] == [[], []]
    assert REQUESTS[0] in request_text(blind[0][0])
    assert "pass 2, row 0" in request_text(blind[0][0])
    assert blind[0][1][:-1] == unseen(TALK)[:-1]  # what was said before is there again
    assert request_text(TALK) in request_text(blind[0][1])
    assert "pass 2, row 1" in request_text(blind[0][1])


def test_ecso_leaves_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(ecso, monkeypatch, odds=[-1.0, 0.0])
    found = ECSO().generate(ASKED, CHATS, **SHORT)
    assert found == [told(1, row) for row in range(3)]
    assert len(script.asked) == 1
    ECSO().generate(ASKED, CHATS[1:2], **SHORT)
    assert len(script.judged) == 1  # nothing to close one's eyes to


def test_the_guard_model_refuses_what_it_calls_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(guard_model, monkeypatch, odds=[2.0, -2.0, 0.0])
    defence = GuardModel(JUDGE)
    found = defence.generate(ASKED, CHATS, **SHORT)
    assert found == [Answer(REFUSAL, 0), told(1, 0), told(1, 1)]
    ((judge, questions),) = script.judged
    assert judge is JUDGE
    assert not any(map(images_of, questions))
    assert all(r in request_text(said) for r, said in zip(REQUESTS, questions, strict=True))
    assert script.asked == [(list(CHATS[1:]), SHORT)]

    script.odds = [1.0] * 3
    found = defence.generate(ASKED, CHATS)
    assert found == [Answer(REFUSAL, 0)] * 3
    assert len(script.asked) == 1


# --- ShiftDC ---


def corrected(state: Tensor, text: Tensor, s: Tensor) -> Tensor:
    """ĥ = h − proj_s(h − t), one number at a time, in float64."""
    h, t, s = (x.double().tolist() for x in (state, text, s))  # type: ignore[assignment]
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


@pytest.mark.parametrize("chat", [CHATS[0], TALK], ids=["one turn", "talk"])
def test_shiftdc_is_two_passes_by_hand(
    exact_model: Llava,
    processor: LlavaProcessor,
    guard: Guard,
    monkeypatch: pytest.MonkeyPatch,
    chat: Chat,
) -> None:
    """The last prompt token alone, in the guard's layers alone, and later layers see it."""
    model, defence = exact_model, ShiftDC.of(guard, caption_tokens=3)
    look = chat_of(shiftdc._DESCRIBE, *images_of(chat))
    caption = generate_answers(VLM(model, processor), [look], max_new_tokens=3)[0].text
    said = shiftdc._CAPTIONED.format(caption=caption, request=request_text(chat))
    text = run_row(model, *by_hand(model, processor, rephrased(unseen(chat), said)))[0]

    s = guard.policy.directions.harmful_mean - guard.policy.directions.harmless_mean

    def change(layer: int, position: int, state: Tensor) -> Tensor:
        if layer not in guard.policy.layers:
            return state
        return corrected(state, text[layer][-1], s[layer])

    row, pixels = by_hand(model, processor, chat)
    prompt, expected = len(row), []
    unmoved = run_row(model, row, pixels)[1][-1]
    for _ in range(SHORT["max_new_tokens"]):
        last = run_row(model, row, pixels, change=change, start=prompt - 1, stop=prompt)[1][-1]
        expected.append(last)
        row.append(int(last.argmax()))

    found, logits = with_logits(monkeypatch, model, defence, processor, [chat, CHATS[1]])
    torch.testing.assert_close(logits[0], torch.stack(expected), rtol=0, atol=1e-5)
    assert (expected[0] - unmoved).abs().max() > 1e-3
    assert found[0].text == processor.decode(row[prompt:], skip_special_tokens=True)
    assert found[1] == greedy(model, processor, CHATS[1])  # no image, left as it is


def test_shiftdc_needs_an_image(model: Llava, processor: LlavaProcessor, guard: Guard) -> None:
    plain = generate_answers(VLM(model, processor), CHATS[1:2], **SHORT)
    assert ShiftDC.of(guard).generate(VLM(model, processor), CHATS[1:2], **SHORT) == plain


@pytest.mark.parametrize("name", ["shiftdc", "cmrm", "inferaligner"])
def test_rows_and_their_beams_are_steered_apart(
    exact_model: Llava,
    processor: LlavaProcessor,
    guard: Guard,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    defence, chats = defences(guard, [name])[name], (CHATS[1], *CHATS, TALK)

    def logits_of(defence: Defence, chats: Sequence[Chat]) -> Tensor:
        """(rows, tokens, vocabulary) of each row's first beam."""
        return with_logits(monkeypatch, exact_model, defence, processor, chats, num_beams=2)[1][::2]

    found = logits_of(defence, chats)
    for row, chat in zip(found, chats, strict=True):
        torch.testing.assert_close(row, logits_of(defence, [chat])[0], rtol=0, atol=1e-5)
    assert float((found - logits_of(NONE, chats))[-1, 0].abs().max()) > 1e-3


# --- InferAligner, CMRM ---


def expected_logits(
    model: Llava, processor: LlavaProcessor, chat: Chat, change: Change
) -> tuple[Answer, Tensor]:
    """Every token changed in every pass, no cache, no padding, float64."""
    row, pixels = by_hand(model, processor, chat)
    prompt, logits = len(row), []
    for _ in range(SHORT["max_new_tokens"]):
        logits.append(run_row(model, row, pixels, change=change)[1][-1])
        row.append(int(logits[-1].argmax()))
    text = processor.decode(row[prompt:], skip_special_tokens=True)
    return Answer(text, len(row) - prompt), torch.stack(logits)


def plain_logits(model: Llava, processor: LlavaProcessor, chat: Chat) -> Tensor:
    return run_row(model, *by_hand(model, processor, chat))[1][-1]


def test_inferaligner_pushes_every_token_where_its_gate_is_open(
    exact_model: Llava, processor: LlavaProcessor, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x + α/n g θ; a layer's gate reads the last prompt token before anything is pushed."""
    model, chats, layers = exact_model, (*CHATS, TALK), (1, 2, 3, 4)
    made = InferAligner.of(guard, strength=0.7)
    read = {i: run_row(model, *by_hand(model, processor, c))[0] for i, c in enumerate(chats)}
    along = {
        (i, layer): sum(
            a * b
            for a, b in zip(
                read[i][layer][-1].tolist(), made.direction[layer].double().tolist(), strict=True
            )
        )
        for i in read
        for layer in layers
    }
    # thresholds between the requests', so that each layer opens for some of them
    threshold = torch.zeros(len(guard.policy.directions.auroc))
    for place, layer in enumerate(layers):
        values = sorted(along[i, layer] for i in read)
        threshold[layer] = (values[place % 3] + values[place % 3 + 1]) / 2
    defence = InferAligner(made.direction, threshold, layers, 0.7)

    found, logits = with_logits(monkeypatch, model, defence, processor, chats)
    patterns = set()
    for i, chat in enumerate(chats):
        opened = [layer for layer in layers if along[i, layer] > float(threshold[layer])]
        patterns.add(tuple(opened))

        def change(layer: int, position: int, state: Tensor, opened: list[int] = opened) -> Tensor:
            return state + 0.7 / 4 * made.direction[layer].double() if layer in opened else state

        answer, expected = expected_logits(model, processor, chat, change)
        assert found[i] == answer
        torch.testing.assert_close(logits[i], expected, rtol=0, atol=1e-5)
        if opened:
            assert (expected[0] - plain_logits(model, processor, chat)).abs().max() > 1e-2
    assert len(patterns) >= 3


def test_inferaligner_takes_direction_and_threshold_from_the_anchors(guard: Guard) -> None:
    """θ is the difference of means, and the gate's edge lies halfway between the two."""
    defence = InferAligner.of(guard)
    assert defence.layers == guard.policy.layers
    for layer in guard.policy.layers:
        harmful = guard.policy.directions.harmful_mean[layer].double()
        harmless = guard.policy.directions.harmless_mean[layer].double()
        theta = harmful - harmless
        torch.testing.assert_close(defence.direction[layer].double(), theta, rtol=0, atol=1e-5)
        edge = float(defence.threshold[layer])
        assert float(theta @ harmless) < edge < float(theta @ harmful)
        assert float(theta @ harmful) - edge == pytest.approx(
            edge - float(theta @ harmless), rel=1e-3
        )


def test_cmrm_takes_the_images_mean_shift_from_every_token(
    exact_model: Llava, processor: LlavaProcessor, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """h − α/n v in the guard's layers, in conversations with an image alone."""
    model, chats = exact_model, (*CHATS, TALK)
    found, logits = with_logits(monkeypatch, model, CMRM.of(guard, strength=0.8), processor, chats)

    def change(layer: int, position: int, state: Tensor) -> Tensor:
        return (
            state - 0.8 / 2 * guard.policy.drift[layer].double()
            if layer in guard.policy.layers
            else state
        )

    for i, chat in enumerate(chats):
        if not images_of(chat):
            assert found[i] == greedy(model, processor, chat)
            continue
        answer, expected = expected_logits(model, processor, chat, change)
        assert found[i] == answer
        torch.testing.assert_close(logits[i], expected, rtol=0, atol=1e-5)
        assert (expected[0] - plain_logits(model, processor, chat)).abs().max() > 1e-2


def test_steering_that_never_ran_is_an_error(model: Llava) -> None:
    backbone = Backbone.of(model)
    with (
        pytest.raises(SafeguardError, match=r"Layers \[2\] never ran"),
        steered(backbone, {2: adding(torch.zeros(1, backbone.hidden_size))}),
    ):
        pass
    with pytest.raises(KeyError), steered(backbone, {2: adding(torch.zeros(1, 1))}):
        raise KeyError  # what went wrong inside is what is told
    assert not any(layer._forward_hooks for layer in backbone.layers)


# --- VLM-Guard as the paper writes it ---


@pytest.mark.parametrize("name", ["vlm-guard-project", "vlm-guard-add"])
def test_the_literal_method_is_two_passes_by_hand(
    exact_model: Llava,
    processor: LlavaProcessor,
    guard: Guard,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """h − g P h and h + g P h(q); g_l is the sign of V_1·h_l(q), uncentred, layer by layer."""
    model, chats = exact_model, (*CHATS, TALK)
    wide = guard.variant(layers=(1, 2, 3, 4))
    defence = defences(wide, [name])[name]
    found, logits = with_logits(monkeypatch, model, defence, processor, chats)
    decisions: set[tuple[int, ...]] = set()
    for i, chat in enumerate(chats):
        text = run_row(model, *by_hand(model, processor, unseen(chat)))[0]
        V = {
            n: guard.policy.directions.vectors[n, : guard.policy.rank].double()
            for n in wide.policy.layers
        }
        opened = tuple(n for n in wide.policy.layers if float(V[n][0] @ text[n][-1]) > 0)
        decisions.update((n, n in opened) for n in wide.policy.layers)
        P = {n: V[n].mT @ V[n] for n in wide.policy.layers}

        def change(
            n: int,
            position: int,
            h: Tensor,
            opened: tuple[int, ...] = opened,
            P: dict[int, Tensor] = P,
            text: list[Tensor] = text,
        ) -> Tensor:
            if n not in opened:
                return h
            return h - P[n] @ h if name.endswith("project") else h + P[n] @ text[n][-1]

        row, pixels = by_hand(model, processor, chat)
        prompt, expected = len(row), []
        for _ in range(SHORT["max_new_tokens"]):
            last = run_row(model, row, pixels, change=change, start=prompt - 1, stop=prompt)
            expected.append(last[1][-1])
            row.append(int(expected[-1].argmax()))
        torch.testing.assert_close(logits[i], torch.stack(expected), rtol=0, atol=1e-5)
        receipt = found[i].receipt
        assert receipt is not None
        assert receipt.layers == opened
    assert {is_open for _, is_open in decisions} == {True, False}
