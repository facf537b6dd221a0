"""Every verified family passes every check of the doctor, on a small model of it."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import ProcessorMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
)

from tiny import each_family, load_makers
from vlm_safeguard.doctor import Examination
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.activations import text_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import encode_batch, encode_chat
from vlm_safeguard.model.families import FAMILIES, REFUSED, every_family
from vlm_safeguard.model.text_pass import TextPass
from vlm_safeguard.policy.token_ids import shared_start

MAKERS = load_makers()
PAGE = Path(__file__).parents[1] / "docs" / "families.md"


@pytest.mark.parametrize("model_type", each_family())
def test_a_small_model_passes_every_check(model_type: str) -> None:
    model, processor = MAKERS[model_type]()
    assert model.config.model_type == model_type
    checks = Examination(model.double(), processor).run()
    assert all(check.passed for check in checks), "\n".join(map(str, checks))


@pytest.mark.parametrize("model_type", each_family())
def test_final_states_of_text_give_the_next_token_s_own_logits(model_type: str) -> None:
    model, processor = MAKERS[model_type]()
    backbone = Backbone.of(model.double())
    with torch.no_grad():
        found = backbone.next_token_logits(
            backbone.run_text([encode_chat(processor, "Why?")])[:, 0]
        )
        inputs = encode_batch(processor, ["Why?"], [[]]).to("cpu", model.dtype)
        own = model(**inputs).logits[:, -1].float()
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    _check_going_on(backbone, processor)


@torch.no_grad()
def _check_going_on(backbone: Backbone, processor: ProcessorMixin) -> None:
    """What follows texts, or what they begin with, is as if it was read with that.

    Within float32's rounding, as some families compute a part in it whatever the model's type is.
    """
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    short, long = (tuple(encode_chat(processor, text)) for text in ("Why?", "How is bread made?"))
    _, final = text_states(backbone, [long, short])  # which begin alike
    close(final, backbone.run_text([long, short])[:, 0].float())
    begun = backbone.read_texts([tuple(shared_start([long[:-1], short[:-1]]))])
    if begun.reaches(len(long) + 1) and not backbone.bidirectional:
        _check_going_on_in(backbone, backbone.read_texts([short, long], begun), short, long)
    _check_going_on_in(backbone, backbone.read_texts([short, long]), short, long)


@torch.no_grad()
def _check_going_on_in(
    backbone: Backbone, read: TextPass, short: tuple[int, ...], long: tuple[int, ...]
) -> None:
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    tokens = (backbone.text_token, backbone.text_token + 1, backbone.text_token)
    close(read.final, backbone.run_text([short, long])[:, 0])
    expected = backbone.run_text([long, short], tokens)[:, 1:]
    close(backbone.go_on(None, [long, short], tokens), expected)
    if not read.holds([long, short]):
        assert read.cache_of([short]) is None
        close(backbone.go_on(read, [long, short], tokens), expected)
        return
    for _ in range(2):  # the texts' own cache stays as it was
        behind = backbone.go_on(read, [long, short], tokens)
        close(behind, expected)
    assert read.cache_of([long]).get_seq_length() == len(long)


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
@torch.no_grad()
def test_texts_longer_than_a_sliding_window_are_read_as_they_are_alone(model_type: str) -> None:
    """All begin alike; of Gemma's layers some see 16 tokens."""
    model, processor = MAKERS[model_type]()
    backbone = Backbone.of(model.double())
    texts = ["Why?", "How do I bake bread, and how long?", "How do I bake a large loaf of rye " * 3]
    rows = [encode_chat(processor, text) for text in texts]
    assert max(map(len, rows)) > 2 * 16
    _, final = text_states(backbone, rows)
    for row, mine in zip(rows, final, strict=True):
        alone = backbone.run_text([row])[0, 0].float()
        torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-5)


def test_every_verified_family_has_a_small_model_here() -> None:
    assert set(MAKERS) == set(FAMILIES)


def test_every_type_of_transformers_is_verified_or_refused_with_a_reason() -> None:
    assert not set(FAMILIES) & set(REFUSED)
    assert set(KNOWN) <= {*FAMILIES, *REFUSED}
    rows = every_family()
    assert len(rows) == len({row["type"] for row in rows}) >= len(KNOWN)
    assert all((row["status"] == "refused") == bool(row["reason"]) for row in rows)


def test_the_page_lists_the_verified_families_and_the_refused() -> None:
    verified, refused = (
        set(re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE))
        for section in PAGE.read_text("utf-8").split("\n## Refused\n")
    )
    assert verified == {row["type"] for row in every_family() if row["status"] == "verified"}
    assert f"{len(FAMILIES)} [families]" in (PAGE.parents[1] / "README.md").read_text("utf-8")
    assert refused == {row["type"] for row in every_family() if row["status"] == "refused"}


def test_a_refused_type_says_why() -> None:
    with pytest.raises(SafeguardError, match=r"diffusion_gemma.*diffusion, not token after token"):
        Backbone.of(SimpleNamespace(config=SimpleNamespace(model_type="diffusion_gemma")))  # type: ignore[arg-type]
