"""Videos and audio leave the text-only view as images do, in every family, or are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from support.media import made
from tiny import each_family, family_param, load_makers
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import (
    encode_messages,
    letters,
    noise_media,
    render_messages,
    tokenizer_of,
    user_message,
    without_media,
)
from vlm_safeguard.model.families import FAMILIES
from vlm_safeguard.model.media import Shown, Video
from vlm_safeguard.model.template import learn_text_view
from vlm_safeguard.policy.media import KINDS, Clip, Kind, Media
from vlm_safeguard.policy.text_view import TextView

pytestmark = pytest.mark.xdist_group("media")  # they share views, which are slow to learn
MAKERS = load_makers()
#: Families whose processors write a time, in ordinary tokens, between the frames of a video.
TIMED = (
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "cosmos3_omni"),
    *("cosmos3_edge", "cohere_compass", "lfm3_vl", "glm4v", "glm4v_moe", "glm46v", "glmga"),
    *("glm_ocr", "glm5_next", "gemma4", "gemma4_unified", "internvl", "kimi_k25", "molmo2"),
    *("muse_glimmer", "muse_spark", "video_llama_3"),
)
HEARD_OR_SEEN = [
    family_param(name, kind)
    for name, family in FAMILIES.items()
    for kind in family.media
    if kind != "image"
]
AUDIBLE = tuple(name for name, family in FAMILIES.items() if "audio" in family.media)
#: Families whose images are nothing but placeholders, more for a larger one: where one ends and the
#: next begins is not in the tokens.
ENDLESS = ("lighton_ocr",)
#: What users type; none begins or ends with what a tokenizer fuses with a text beside it.
TEXTS = (
    "What is shown here?",
    "Look at this.\n",
    "It took <0.3 seconds>.\n",
    "Frame1: 00:01 is step 2.\n",
    "An image, a video and audio.\n",
)


def written(processor: Any, *messages: dict[str, Any]) -> tuple[list[int], list[int]]:
    """A conversation's token ids, and the template's own without its media."""
    shown = noise_media(processor, list(messages))
    return (
        encode_messages(processor, list(messages), shown),
        encode_messages(processor, without_media(list(messages))),
    )


def reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# --- what each family takes ---


@pytest.mark.parametrize("model_type", each_family())
def test_families_say_which_media_are_guarded_and_which_refused(model_type: str) -> None:
    _, view = made(model_type)
    refused = {kind for clip in view.clips for kind in clip.kinds} - view.kinds
    assert set(FAMILIES[model_type].media) == view.kinds
    assert set(FAMILIES[model_type].refused) == refused


@pytest.mark.parametrize("model_type", each_family())
def test_every_token_that_a_config_names_for_media_is_known(model_type: str) -> None:
    model, _ = MAKERS[model_type]()
    config, known = model.config, Backbone.of(model).placeholder_ids
    for kind in KINDS:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            assert getattr(config, name, None) in {None, *known}


# --- the view ---


@pytest.mark.parametrize(("model_type", "kind"), HEARD_OR_SEEN)
def test_a_view_is_the_template_s_own_text_without_media(model_type: str, kind: Kind) -> None:
    processor, view = made(model_type)
    ask, more = TEXTS[:2]
    for messages, media in (
        ([user_message(kind, ask)], {kind: 1}),
        ([user_message("image", kind, ask)], {kind: 1, "image": 1}),
        ([user_message(kind, "image", ask)], {kind: 1, "image": 1}),
        ([user_message(kind, more), reply("Bread."), user_message(ask)], {kind: 1}),
        ([user_message(more), reply("Bread."), user_message(kind, ask)], {kind: 1}),
        (
            [user_message("image", more), reply("Bread."), user_message(kind, ask)],
            {kind: 1, "image": 1},
        ),
    ):
        ids, plain = written(processor, *messages)
        text = view(ids)
        if any(clip.instead for clip in view.clips) and "image" in media:  # fused with each other
            tokenizer = tokenizer_of(processor)
            assert letters(tokenizer, text) == letters(tokenizer, plain)
        else:
            assert text == plain, (tokenizer_of(processor).decode(text), messages)
        counted = view.media(ids)
        assert counted == Media(
            media.get("image", 0), media.get("video", 0), media.get("audio", 0), counted.tokens
        )
        assert counted.tokens == sum(token in view.placeholder_ids for token in ids)
        assert view.first_medium(ids) < len(ids)
        kept, places = view.aligned(ids)
        assert all(
            place is None or ids[place] == token for token, place in zip(kept, places, strict=True)
        )


messages_of = st.lists(
    st.lists(st.one_of(st.sampled_from(TEXTS), st.sampled_from(KINDS)), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize(
    "model_type", [family_param(name) for name, family in FAMILIES.items() if len(family.media) > 1]
)
def test_any_interleaving_leaves_the_template_s_own_text_or_is_refused(model_type: str) -> None:
    """But for white space, which templates trim and tokenizers fuse with what is around it."""
    processor, view = made(model_type)
    tokenizer = tokenizer_of(processor)
    exact = 0

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(messages_of)
    def check(turns: list[list[str]]) -> None:
        nonlocal exact
        asked = [
            user_message(
                *(part for part in parts if part not in KINDS or part in view.kinds), "Why?"
            )
            for parts in turns
        ]
        messages = [turn for each in asked for turn in (each, reply("Bread."))][:-1]
        try:
            ids, plain = written(processor, *messages)
        except (SafeguardError, ValueError):
            return  # not every template takes media everywhere, nor every processor several
        try:
            text = view(ids)
        except SafeguardError:
            return  # where its text is fused with what the user typed before it
        exact += text == plain
        assert letters(tokenizer, text) == letters(tokenizer, plain)

    check()
    assert exact >= 10, exact


@pytest.mark.parametrize("model_type", TIMED)
def test_no_time_between_frames_stays_and_a_typed_one_does(model_type: str) -> None:
    processor, view = made(model_type)
    typed = "It took <0.3 seconds> at 00:01, Time: 0.5s.\n"
    for frames in (1, 2, 3, 7):
        pixels = torch.randint(256, (frames, 64, 96, 3), dtype=torch.uint8)
        messages = [user_message("video", typed)]
        ids = encode_messages(processor, messages, Shown(videos=[Video(pixels, 0.7, 11)]))
        plain = encode_messages(processor, without_media(messages))
        assert view(ids) == plain
        assert "0.3" in tokenizer_of(processor).decode(view(ids))
        assert view.media(ids).videos == 1
        between = [token for token in ids if token not in view.placeholder_ids]
        assert len(between) > len(plain)  # there were times to take out


@pytest.mark.parametrize("model_type", ["qwen3_vl", "glm46v", "muse_spark"])
def test_a_time_typed_between_two_videos_or_images_is_text(model_type: str) -> None:
    processor, view = made(model_type)
    for kind in ("video", "image"):
        ids, plain = written(processor, user_message(kind, "<0.3 seconds>", kind, "Why?"))
        assert view(ids) == plain
        assert view.media(ids).total == 2


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "qwen3_5", "cosmos3_omni"])
def test_labels_that_a_template_writes_if_asked_leave_with_their_media(model_type: str) -> None:
    """Qwen's `add_vision_id`: "Picture 1: " and "Video 1: "."""
    processor, view = made(model_type)
    ask = "Why?"
    for messages in (
        [user_message("image", ask)],
        [user_message("video", ask)],
        [user_message("image", "video", "image", "video", ask)],
        [user_message(*["image"] * 11, ask)],
        [user_message("image", ask), reply("Bread."), user_message("image", "video", ask)],
        [user_message("Picture 1: is typed. Video 2: too.\n", "image", ask)],
    ):
        shown = noise_media(processor, messages)
        ids = encode_messages(processor, messages, shown, add_vision_id=True)
        assert len(ids) > len(encode_messages(processor, messages, shown))
        assert view(ids) == encode_messages(processor, without_media(messages))
        assert view.media(ids).images == len(shown.images)
        assert view.media(ids).videos == len(shown.videos)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("model_type", TIMED)
def test_times_of_any_frame_rate_leave_the_view(model_type: str, told: bool) -> None:
    """Whether the caller says how fast a video is, or the processor has to guess."""
    processor, view = made(model_type)
    messages = [user_message("video", "Why?")]
    pixels = torch.randint(256, (90, 32, 32, 3), dtype=torch.uint8)
    given = Shown(videos=[Video(pixels, 29.97, 100_000)]).arguments()
    if not told:
        del given["video_metadata"]
    inputs = processor(text=[render_messages(processor, messages)], return_tensors="pt", **given)
    plain = encode_messages(processor, without_media(messages))
    assert view(inputs["input_ids"][0].tolist()) == plain


@pytest.mark.parametrize("model_type", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_a_video_that_is_read_with_its_sound_leaves_the_view_whole(model_type: str) -> None:
    processor, view = made(model_type)
    for messages in (
        [user_message("video", "What is said?")],
        [user_message("Hello.\n", "video", "What is said?")],
    ):
        shown = noise_media(processor, messages)
        sound = torch.linspace(-0.1, 0.1, 40000)
        ids = encode_messages(processor, messages, replace(shown, sound=sound))
        alone = encode_messages(processor, messages, shown)
        assert len(ids) > len(alone)
        assert view(ids) == view(alone) == encode_messages(processor, without_media(messages))
        assert view.media(ids) == Media(videos=1, audios=1, tokens=view.media(ids).tokens)
        assert view.media(alone) == Media(videos=1, tokens=view.media(alone).tokens)


# --- counting ---


@pytest.mark.parametrize("model_type", each_family())
def test_adjacent_images_are_counted_one_by_one(model_type: str) -> None:
    processor, view = made(model_type)
    for sizes in ([(64, 64)] * 3, [(64, 64), (300, 100), (96, 64)]):
        images = [noise_image(i).resize(size) for i, size in enumerate(sizes)]
        for count in (1, 2, 3):
            ids = encode_messages(
                processor, [user_message(*["image"] * count, "Why?")], Shown(images[:count])
            )
            if view.counted or view.before or view.after or count == 1:
                assert view.media(ids).images == count, (count, view.counted)
            else:  # bare runs of placeholders, as long as each image is large
                assert model_type in ENDLESS
                assert 1 <= view.media(ids).images <= count


def test_several_videos_and_audios_are_counted() -> None:
    for model_type, kind in (("qwen3_vl", "video"), ("qwen2_vl", "video"), ("gemma4", "audio")):
        processor, view = made(model_type)
        ids, plain = written(processor, user_message(kind, kind, kind, "Why?"))
        assert view(ids) == plain
        assert view.media(ids).total == 3


# --- what is refused ---


@pytest.mark.parametrize(
    "model_type", [name for name, family in FAMILIES.items() if family.refused]
)
def test_what_a_family_refuses_is_refused_in_one_sentence(model_type: str) -> None:
    processor, view = made(model_type)
    for kind in FAMILIES[model_type].refused:
        messages = [user_message(kind, "Why?")]
        try:
            ids = encode_messages(processor, messages, noise_media(processor, messages))
        except SafeguardError:
            ids = []
        plain = encode_messages(processor, [user_message("Why?")])
        if set(ids) <= set(plain):  # neither its template nor its processor writes one
            ids = [*view.placeholder_ids - (view.image_ids or frozenset()), *plain]
        for read in (view, view.aligned, view.media, view.first_medium):
            with pytest.raises(SafeguardError, match=r"cannot take out of its text.*Leave it out"):
                read(ids)
        assert view(plain) == plain


@pytest.mark.parametrize("model_type", [*AUDIBLE, "qwen3_vl", "glm4v", "internvl"])
def test_a_typed_placeholder_never_stays_in_the_view(model_type: str) -> None:
    processor, view = made(model_type)
    tokenizer = tokenizer_of(processor)
    plain = encode_messages(processor, [user_message("Why?")])
    for token in view.placeholder_ids:
        typed = [*plain[:3], token, *plain[3:]]
        if token in (view.image_ids or ()):
            assert view.media(typed).images == 1
            assert token not in view(typed)
        elif any(clip.known and clip.head == (token,) for clip in view.clips):
            assert view.media(typed).total == 1  # nothing tells it from a real one
            assert view(typed) == plain
        else:
            with pytest.raises(SafeguardError, match="Leave it out"):
                view(typed)
    assert view(plain) == plain, tokenizer.decode(plain)


def test_a_processor_without_its_video_processor_gives_a_view_that_refuses_videos() -> None:
    """As on a machine without torchvision; a guard fitted there may be used elsewhere."""
    for model_type in ("qwen3_vl", "glm4v"):
        model, processor = MAKERS[model_type]()
        ids, _ = written(processor, user_message("video", "Why?"))
        processor.video_processor = None
        view = learn_text_view(processor, Backbone.of(model).placeholder_ids)
        assert view.kinds == {"image"}
        with pytest.raises(SafeguardError, match="a video that this guard cannot take out"):
            view(ids)


def test_an_unknown_form_of_a_known_kind_is_refused() -> None:
    """Another version of the processor writes times otherwise."""
    processor, view = made("qwen3_vl")
    ids, _ = written(processor, user_message("video", "Why?"))
    seconds = tokenizer_of(processor)("<0 seconds>", add_special_tokens=False)["input_ids"][-2]
    changed = [token for token in ids if token != seconds]
    assert len(changed) < len(ids)
    with pytest.raises(SafeguardError, match="a video that this guard cannot take out"):
        view(changed)


# --- keeping ---


def test_a_view_with_clips_is_kept_in_json() -> None:
    _, view = made("qwen3_omni_moe_thinker")
    kept = TypeAdapter(TextView)
    assert kept.validate_json(kept.dump_json(view)) == view
    assert any(clip.unit for clip in made("qwen3_vl")[1].clips)


def test_a_view_from_before_clips_is_read_and_refuses_what_it_cannot_tell_apart() -> None:
    old = {"placeholder_ids": [4], "frame_ids": [5], "exact": True}
    view = TypeAdapter(TextView).validate_json(json.dumps(old))
    assert view([1, 4, 4, 2]) == [1, 2]
    assert view.media([1, 4, 4, 2]) == Media(images=1, tokens=2)
    both = TypeAdapter(TextView).validate_json(json.dumps({**old, "placeholder_ids": [4, 6]}))
    assert both([1, 2]) == [1, 2]
    with pytest.raises(SafeguardError, match="fit it again"):
        both([1, 4, 2])


def test_a_pattern_is_matched_whole_and_with_any_number() -> None:
    clip = Clip(
        ("video",), frozenset({9}), (1, 20, 30, 1, 9, 2), (20, 30, 1, 9, 2), (2,), instead=(7,)
    )
    view = TextView(
        frozenset({8, 9}),
        frame_ids=frozenset({1, 2}),
        number_ids=frozenset({30, 31}),
        image_ids=frozenset({8}),
        clips=(clip, Clip(("video",), frozenset({9}), (9,), known=False)),
        counted=(1, 1),
    )
    video = [1, 20, 31, 30, 1, 9, 9, 2, 20, 31, 1, 9, 2, 2]
    row = [5, *video, 6, 1, 8, 8, 2, 1, 8, 2, 20, 30, *video, *video]
    kept, places = view.aligned(row)
    assert kept == [5, 7, 6, 20, 30, 7, 7]
    assert places[:3] == [0, None, 1 + len(video)]
    assert view.media(row) == Media(images=2, videos=3, tokens=3 + 9)
    with pytest.raises(SafeguardError, match="a video"):
        view([5, *video[:-1], 6])
