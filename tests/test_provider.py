"""The provider, asked through inspect-ai, on a tiny model saved to a folder."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai.model import (
    CachePolicy,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlm_safeguard.defences.table import defences
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation import registry  # noqa: F401  (registers what inspect looks up)
from vlm_safeguard.evaluation.answers import models as module
from vlm_safeguard.evaluation.answers.messages import chat_of_messages, messages_of
from vlm_safeguard.evaluation.answers.models import release
from vlm_safeguard.evaluation.answers.provider import generation_options
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.loading import Loading, load_model
from vlm_safeguard.model.backbone import chat_inputs
from vlm_safeguard.model.conversation import Turn, chat_of
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.gate import GATES

GREEDY = GenerateConfig(max_tokens=5)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    guard: Guard,
) -> Iterator[Path]:
    """A checkpoint, with a guard whose gate is open in guard/."""
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    guard.variant(gate=GATES["open"]).save_pretrained(folder / "guard")
    yield folder
    release()


def asks(folder: Path, **arguments: Any) -> Model:
    return get_model(f"vlm-safeguard/{folder}", memoize=False, **arguments)


def ask(model: Model, *requests: Any, config: GenerateConfig = GREEDY, **options: Any) -> list[Any]:
    """All requests at once, in an event loop of their own."""

    async def all_of_them() -> list[ModelOutput]:
        return await asyncio.gather(
            *(model.generate(r, config=config, **options) for r in requests)
        )

    return asyncio.run(all_of_them())


def by_hand(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, chat: Any, **options: Any
) -> str:
    inputs = chat_inputs(model, processor, [chat])
    output = model.generate(**inputs, max_new_tokens=5, **{"do_sample": False, **options})
    text: str = processor.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def test_it_answers_conversations_as_the_model_does(
    folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    noise_image(1).save(tmp_path / "one.png")
    kept = io.BytesIO()
    noise_image(2).save(kept, "png")
    uri = "data:image/png;base64," + base64.b64encode(kept.getvalue()).decode()
    messages: list[ChatMessage] = [
        ChatMessageSystem(content="Be brief."),
        ChatMessageUser(content=[ContentImage(image=uri), ContentText(text="What is it?")]),
        ChatMessageAssistant(content="Noise."),
        ChatMessageUser(
            content=[
                ContentText(text="And"),
                ContentImage(image=str(tmp_path / "one.png")),
                ContentText(text="this?"),
            ]
        ),
    ]
    chat = (
        Turn("system", ("Be brief.",)),
        Turn("user", (noise_image(2), "What is it?")),
        Turn("assistant", ("Noise.",)),
        Turn("user", ("And", noise_image(1), "this?")),
    )
    read = chat_of_messages(messages)
    assert [turn.role for turn in read] == [turn.role for turn in chat]
    for mine, theirs in zip(read, chat, strict=True):
        for a, b in zip(mine.content, theirs.content, strict=True):
            same = a == b if isinstance(a, str) else a.tobytes() == b.tobytes()  # type: ignore[union-attr]
            assert same
    assert chat_of_messages(messages_of(chat))[1].content[0].tobytes() == noise_image(2).tobytes()  # type: ignore[union-attr]
    (output,) = ask(asks(folder), messages_of(chat))
    assert output.completion == by_hand(model, processor, chat)
    assert output.metadata["receipt"] is None
    assert output.metadata["tokens"] == 5
    assert output.metadata["seconds"] > 0
    assert output.stop_reason == "max_tokens"


def test_a_batch_gives_what_each_gets_alone_and_is_one(folder: Path) -> None:
    requests = [messages_of(chat_of(f"How to bake {n} loaves", noise_image(n))) for n in range(5)]
    together = ask(asks(folder, batch_size=5), *requests)
    assert {output.metadata["batch"] for output in together} == {5}
    alone = [ask(asks(folder, batch_size=1), request)[0] for request in requests]
    assert [x.completion for x in together] == [x.completion for x in alone]


@pytest.mark.parametrize("name", ["default", "restore", "self-reminder", "inferaligner"])
def test_a_defence_answers_as_the_table_says(
    folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor, name: str
) -> None:
    guard = Guard.from_pretrained(folder / "guard")
    chat = chat_of("How to swim", blank_image())
    expected = defences(guard, [name])[name].generate(
        VLM(model, processor), [chat], max_new_tokens=5
    )
    (found,) = ask(asks(folder, defence=name, guard=str(folder / "guard")), messages_of(chat))
    assert found.completion == expected[0].text
    receipt = expected[0].receipt
    assert found.metadata["receipt"] == (receipt and receipt.model_dump(mode="json"))
    assert (receipt is not None) == (name in ("default", "restore"))


def test_a_model_is_loaded_once_for_all_defences(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release()
    loads = []

    def load(name: str, loading: Loading) -> tuple[Any, Any]:
        loads.append(name)
        return load_model(name, loading)

    monkeypatch.setattr(module, "load_model", load)
    for defence in ("none", "default", "restore"):
        ask(asks(folder, defence=defence, guard=str(folder / "guard")), "How to swim")
    assert len(loads) == 1


def test_a_guard_that_fails_gives_no_answer(folder: Path, tmp_path: Path) -> None:
    broken = asks(folder, defence="default", guard=str(tmp_path))
    with pytest.raises(SafeguardError, match="is not a guard"):
        ask(broken, "How to swim")


def test_inspects_cache_never_serves_one_defence_with_anothers_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path))
    request = messages_of(chat_of("How to swim", blank_image()))
    policy = CachePolicy(expiry="1D")
    plain, guarded = (
        asks(folder, defence=name, guard=str(folder / "guard")) for name in ("none", "default")
    )
    first = ask(plain, request, cache=policy)[0]
    assert first.metadata["receipt"] is None
    assert ask(plain, request, cache=policy)[0].completion == first.completion
    assert ask(guarded, request, cache=policy)[0].metadata["receipt"]["guarded"]


def test_generation_options_are_honoured(
    folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    chat = chat_of("How to swim")
    request = messages_of(chat)
    plain = ask(asks(folder), request)[0].completion
    stop = plain[len(plain) // 2 :][:2]
    cut = ask(asks(folder), request, config=GenerateConfig(max_tokens=5, stop_seqs=[stop]))[0]
    assert cut.completion == plain[: plain.index(stop)]
    hot: dict[str, Any] = {
        "temperature": 5.0,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 3,
        "max_tokens": 5,
    }
    first, second = (
        ask(asks(folder), request, config=GenerateConfig(**hot))[0].completion for _ in range(2)
    )
    torch.manual_seed(3)
    expected = by_hand(model, processor, chat, do_sample=True, temperature=5.0, top_p=0.9, top_k=40)
    assert first == second == expected != plain
    other = ask(asks(folder), request, config=GenerateConfig(**hot | {"seed": 4}))[0]
    assert other.completion != first


def test_greedy_unless_sampling_is_asked_for() -> None:
    assert not generation_options(GenerateConfig())["do_sample"]
    assert not generation_options(GenerateConfig(temperature=0.0, top_p=0.5))["do_sample"]
    assert generation_options(GenerateConfig(temperature=0.7))["do_sample"]
    assert generation_options(GenerateConfig(top_k=5))["temperature"] == 1.0


@pytest.mark.parametrize(
    "config",
    [
        {"logprobs": True},
        {"num_choices": 2},
        {"frequency_penalty": 0.5},
        {"best_of": 3},
        {"logit_bias": {3: 1.0}},
        {"reasoning_effort": "low"},
    ],
)
def test_what_cannot_be_honoured_is_refused(folder: Path, config: dict[str, Any]) -> None:
    with pytest.raises(SafeguardError, match=f"cannot honour {next(iter(config))}"):
        ask(asks(folder), "How to swim", config=GenerateConfig(**config))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"defence": "magic"}, "There is no defence 'magic'"),
        ({"dtype": "float4"}, "There is no dtype"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "in 4 bits or in 8"),
        ({"batch_size": 0}, "at least 1"),
        ({"trust": True}, "There is no model argument trust"),
        ({"strength": 2.0}, "has no strength"),
        ({"base_url": "http://x"}, "no base URL"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    folder: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(SafeguardError, match=words):
        asks(folder, **arguments)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [
                ChatMessageUser(
                    content=[ContentAudio(audio="data:audio/wav;base64,AA", format="wav")]
                )
            ],
            "not audio",
        ),
        ([ChatMessageTool(content="42")], "tools' messages"),
        ([ChatMessageSystem(content="x")], "no turn of the user"),
        ([ChatMessageUser(content=[ContentImage(image="https://x/y.png")])], "fetch it"),
        (
            [ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])],
            "cannot be read",
        ),
        ([ChatMessageUser(content=[ContentImage(image="/nowhere.png")])], "There is no image"),
    ],
)
def test_messages_that_cannot_be_read_are_refused(messages: Any, words: str) -> None:
    with pytest.raises(SafeguardError, match=words):
        chat_of_messages(messages)


def test_a_language_model_answers_texts_and_takes_no_defence(
    tmp_path: Path, processor: LlavaProcessor
) -> None:
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    language = LlamaForCausalLM(config).eval()
    language.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    requests = ["How to bake a large loaf of rye bread", "How to swim"]
    found = ask(asks(tmp_path, batch_size=2), *requests)
    for request, output in zip(requests, found, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": request}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        new = language.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert output.completion == tokenizer.decode(new, skip_special_tokens=True)
    with pytest.raises(SafeguardError, match="takes no images"):
        ask(asks(tmp_path), messages_of(chat_of("What is it?", blank_image())))
    with pytest.raises(SafeguardError, match="nothing to defend"):
        ask(asks(tmp_path, defence="self-reminder"), "How to swim")


def test_a_receipt_is_plain_json(folder: Path) -> None:
    (found,) = ask(
        asks(folder, defence="default", guard=str(folder / "guard")),
        messages_of(chat_of("How to swim", blank_image())),
    )
    assert json.loads(json.dumps(found.metadata))["receipt"]["images"] == 1
