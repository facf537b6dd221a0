"""The backbone is the language model, found by structure; the view is the request sans images."""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers import LlavaProcessor as Processor

from support.reference import ask, run_row, text_ids
from tiny.gemma import paligemma
from tiny.pocket import make_model, make_processor
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import (
    encode_batch,
    encode_chat,
    encode_messages,
    render_chat,
    user_turn,
)
from vlm_safeguard.model.template import learn_text_view
from vlm_safeguard.policy.media import Media
from vlm_safeguard.policy.text_view import TextView

IMAGE = 4  # the id of <image> in the test tokenizer
WRAPPED = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }} {% for item in m['content'] -%}"
    "{%- if item['type'] == 'image' -%}[({<image>}])"
    "{%- else -%}{{ item['text'] }}{%- endif -%}{%- endfor -%}<|im_end|>{%- endfor -%}"
)


def test_decoder_layers_are_the_language_models(model: LlavaForConditionalGeneration) -> None:
    tower = model.model.vision_tower
    assert len(tower.encoder.layers) == len(model.model.language_model.layers)  # counting is no use
    backbone = Backbone.of(model)
    assert backbone.layers == tuple(model.model.language_model.layers)
    assert backbone.decoder is model.get_submodule(backbone.decoder_path)
    assert backbone.hidden_size == model.model.language_model.embed_tokens.weight.shape[1]
    assert backbone.placeholder_ids == {model.config.image_token_id} == {IMAGE}


def test_a_module_without_config_is_refused() -> None:
    with pytest.raises(SafeguardError, match="Linear is not a transformers model"):
        Backbone.of(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_language_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(SafeguardError, match="not a vision-language model"):
        Backbone.of(LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "model_type", "llava_of_tomorrow"), "not verified"),
        (lambda c: setattr(c, "image_token_id", None), "names no image token"),
        (lambda c: setattr(c.text_config, "num_hidden_layers", 5), "5 decoder layers"),
    ],
)
def test_other_structures_are_refused(processor: Processor, change: Any, message: str) -> None:
    model = make_model(processor)
    Backbone.of(model)
    change(model.config)
    with pytest.raises(SafeguardError, match=message):
        Backbone.of(model)


def test_run_text_pads_without_a_trace(
    exact_model: LlavaForConditionalGeneration, processor: Processor
) -> None:
    backbone = Backbone.of(exact_model)
    rows = [text_ids(processor, text) for text in ("Hi", "How to bake a cake", "Why is it so?")]
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out[:, -1]))
        for layer in backbone.layers
    ]
    with torch.no_grad():
        backbone.run_text(rows)
    for handle in handles:
        handle.remove()
    for number, row in enumerate(rows):
        states, _ = run_row(exact_model, row)
        for layer, state in enumerate(states):
            torch.testing.assert_close(seen[layer][number], state[-1], rtol=1e-10, atol=1e-10)


# --- the text-only view ---


@pytest.mark.parametrize("template", [None, WRAPPED])
@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_view_equals_the_templates_own_text(template: str | None, images: int) -> None:
    processor = make_processor(template) if template else make_processor()
    view = learn_text_view(processor, frozenset({IMAGE}))
    assert view.exact
    assert (
        (view.before, view.after) != ((), ())
        if template
        else (view.before, view.after)
        == (
            (),
            (),
        )
    )
    ids = encode_chat(processor, "What is shown here?", images=images)
    expanded = [t for token in ids for t in ([token] * (2 if token == IMAGE else 1))]
    plain = encode_chat(processor, "What is shown here?")
    assert IMAGE not in plain
    assert view.media(ids) == Media(images=images, tokens=4 * images)
    assert view(ids) == plain
    assert view(expanded) == plain
    if images:
        assert expanded != plain


def test_view_of_what_the_processor_makes(processor: Processor) -> None:
    view = learn_text_view(processor, frozenset({IMAGE}))
    row = ask(processor, ["Which colour?"])["input_ids"][0].tolist()
    assert view.media(row) == Media(images=1, tokens=4)
    assert view(row) == text_ids(processor, "Which colour?")


@pytest.mark.parametrize(("before", "after"), [("", ""), ("b", ""), ("", "a"), ("bB", "aA")])
def test_view_equals_a_regular_expression(before: str, after: str) -> None:
    view = TextView(
        frozenset({ord("P"), ord("Q")}),
        image_ids=frozenset({ord("P"), ord("Q")}),
        before=tuple(map(ord, before)),
        after=tuple(map(ord, after)),
    )
    rng = random.Random(0)
    for _ in range(300):
        parts = [
            rng.choice(
                ["xy", "z", "", f"{before}PP{after}", f"{before}QPQ{after}", "P", "b", "aAx"]
            )
            for _ in range(rng.randrange(7))
        ]
        row = "x".join(parts)  # no two images touch
        codes = [ord(c) for c in row]
        expected = re.sub(f"(?:{before})?[PQ]+(?:{after})?", "", row)
        assert "".join(map(chr, view(codes))) == expected, row
        assert view.media(codes) == Media(
            images=len(re.findall("[PQ]+", row)), tokens=len(re.findall("[PQ]", row))
        )
        dropped = [m.span() for m in re.finditer(f"(?:{before})?[PQ]+(?:{after})?", row)]
        left = [i for i in range(len(row)) if not any(a <= i < b for a, b in dropped)]
        assert view.aligned(codes) == (view(codes), left)
        image = re.search("[PQ]", row)
        assert view.first_medium(codes) == (image.start() if image else len(row))


def test_what_a_view_puts_in_instead_of_an_image_stands_nowhere() -> None:
    def codes(text: str) -> list[int]:
        return [ord(c) for c in text]

    view = TextView(
        frozenset({ord("P")}),
        frame_ids=frozenset(codes("[]")),
        glue_ids=frozenset({ord("-")}),
        glue_length=1,
        before=tuple(codes("photo 1:")),
        number_ids=frozenset(codes("0123456789")),
        after=(ord(";"),),
        instead=tuple(codes("\n\n")),
    )
    row = codes("x;yphoto 12:[PP-P];zP;w;")
    kept, places = view.aligned(row)
    assert "".join(map(chr, kept)) == "x;y\n\nz\n\nw;"
    assert places == [0, 1, 2, None, None, 19, None, None, 22, 23]
    assert view.first_medium(row) == row.index(ord("["))
    assert view.aligned(kept) == (kept, list(range(len(kept))))
    assert view.first_medium(kept) == len(kept)


def test_learn_says_when_the_view_is_not_exact() -> None:
    processor = make_processor(
        "{%- set ns = namespace(seen=false) -%}{%- for item in messages[0]['content'] -%}"
        "{%- if item['type'] == 'image' -%}{%- set ns.seen = true -%}<image>{%- else -%}"
        "{{ item['text'] }}{%- endif -%}{%- endfor -%}{%- if not ns.seen -%} Blind. {%- endif -%}!"
    )
    assert not learn_text_view(processor, frozenset({IMAGE})).exact


class FusingProcessor:
    """Words carry the space before them, as in LLaMA's tokenizer: an image changes the next one."""

    def __init__(self) -> None:
        self.ids = {"<image>": IMAGE}

    def apply_chat_template(self, turns: Any, **_: Any) -> str:
        parts = ["<image>\n" if c["type"] == "image" else c["text"] for c in turns[0]["content"]]
        return "USER: " + "".join(parts) + " ASSISTANT:"

    chat_template = "USER: …"
    all_special_ids = (IMAGE,)
    added_tokens_decoder: ClassVar[dict[int, str]] = {IMAGE: "<image>"}

    def __call__(self, text: list[str], **_: Any) -> dict[str, Tensor]:
        words = re.findall(r"<image>|\n| ?[^\s<]+| ", text[0])
        row = [self.ids.setdefault(word, 100 + len(self.ids)) for word in words]
        return {"input_ids": torch.tensor([row])}

    def get_vocab(self) -> dict[str, int]:
        return self.ids


def test_learn_finds_the_wrapper_where_the_tokenizer_fuses_text_with_it() -> None:
    processor = FusingProcessor()
    view = learn_text_view(processor, frozenset({IMAGE}))  # type: ignore[arg-type]
    names = {token: word for word, token in processor.ids.items()}
    assert not view.exact
    assert [names[token] for token in view.before] == [" "]
    assert [names[token] for token in view.after] == ["\n"]
    seen = view(encode_chat(processor, "Why not?", images=1))  # type: ignore[arg-type]
    words = {token: word for word, token in processor.ids.items()}
    assert [words[token] for token in seen] == ["USER:", "Why", " not?", " ASSISTANT:"]
    assert len(seen) == len(encode_chat(processor, "Why not?"))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_images_that_a_tokenizer_fuses_are_counted_one_by_one(count: int) -> None:
    """In LLaVA's template only a line break stands between them, as it may inside an image."""
    processor = FusingProcessor()
    view = learn_text_view(processor, frozenset({IMAGE}))  # type: ignore[arg-type]
    ids = encode_chat(processor, "Why not?", images=count)  # type: ignore[arg-type]
    assert view.media(ids) == Media(images=count, tokens=count)


def test_learn_refuses_a_template_without_images() -> None:
    processor = make_processor("{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(SafeguardError, match=r"cannot read a conversation with 1 images"):
        learn_text_view(processor, frozenset({IMAGE}))


def test_learn_refuses_the_processor_of_another_model(processor: Processor) -> None:
    with pytest.raises(SafeguardError, match=r"no image token .*looked for ids \[9999\]"):
        learn_text_view(processor, frozenset({9999}))


def test_chat_without_a_template_is_refused() -> None:
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(SafeguardError, match="cannot render a conversation"):
        encode_chat(processor, "Hello")


def test_chat_is_rendered_images_first_and_encoded_once(processor: Processor) -> None:
    text = "<|im_start|>user\n<image><image>Hi<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(processor, "Hi", images=2) == text
    ids = encode_chat(processor, "Hi", images=2)
    assert processor.tokenizer.decode(ids) == text.replace("<image>", 4 * "<image>")
    assert ids.count(ids[0]) == 2
    assert ids[0] == processor.tokenizer.bos_token_id


def test_a_processor_that_demands_an_image_shows_what_text_it_would_write() -> None:
    _, processor = paligemma()
    tokenizer = processor.tokenizer
    written = tokenizer("<bos>Why is it so?\n", add_special_tokens=False)["input_ids"]
    assert encode_chat(processor, "Why is it so?") == written
    shown = encode_chat(processor, "Why is it so?", images=2)
    assert shown == 2 * processor.image_seq_length * [tokenizer.image_token_id] + written
    batch = encode_batch(processor, ["Why?", "Why is it so?"], [[], []])
    assert batch["input_ids"][1].tolist() == written
    assert batch["attention_mask"].sum(1).tolist() == [
        len(encode_chat(processor, "Why?")),
        len(written),
    ]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}


def test_a_processor_without_a_template_takes_one_turn_and_images_for_all_or_none() -> None:
    _, processor = paligemma()
    with pytest.raises(SafeguardError, match="one user turn only"):
        encode_messages(processor, [user_turn("Hi"), user_turn("Hi")])
    with pytest.raises(SafeguardError, match="for all of a batch or for none"):
        encode_batch(processor, ["Hi", "Hi"], [[noise_image(0)], []])


@pytest.mark.parametrize("two", [False, True])
def test_a_prompt_that_is_read_both_ways_is_so_without_its_image_and_padded(two: bool) -> None:
    model, processor = paligemma(two)
    backbone = Backbone.of(model.double())
    rows = [encode_chat(processor, text) for text in ("Why?", "What is it, and why is it so?")]
    with torch.no_grad():
        found = backbone.next_token_logits(backbone.run_text(rows)[:, 0])
        for row, logits in zip(rows, found, strict=True):
            ids = torch.tensor([row])
            prompt = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits[0, -1]
            answer = model(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits[0, -1]
            torch.testing.assert_close(logits, prompt.float(), rtol=1e-5, atol=1e-5)
            assert float((answer - prompt).abs().max()) > 0.01  # read one way, it says other things
