"""Step (b): teach tower and projector to speak to the frozen LLM, on benign images only."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlm_safeguard.images import noise_image
from vlm_safeguard.model.conversation import render_chat
from vlm_safeguard.pocket.recipe.answers import own_answers
from vlm_safeguard.pocket.recipe.loop import autocast, token_loss, train
from vlm_safeguard.pocket.recipe.projector import trainable_parts
from vlm_safeguard.pocket.recipe.tower import DEVELOPMENT_SEED, pixels
from vlm_safeguard.pocket.requests import Phrase, read_phrases
from vlm_safeguard.pocket.scenes import ATTRIBUTES, Question, Scene, answers_correctly

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerBase,
    )

STEPS = 440
BATCH = 12  # images a step, each with all its questions; a multiple of six
LEARNING_RATE = 5e-4
EVERYDAY_STEPS = 50
EVERYDAY = 8  # everyday requests a step, each beside an image of noise
EVERYDAY_LEARNING_RATE = 2e-4
_FIRST_SCENE = 1_000_000
_ANSWER_WEIGHT = 5.0  # of the tokens that name the answer, beside the sentence around them


def train_questions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train tower and projector (float32) in place on questions about scenes, the LLM frozen.

    Args:
        batch: images a step, a multiple of three.
    """

    def after_step(step: int) -> str:
        if step % 40:
            return ""
        questions = [
            (scene, question)
            for scene in (Scene.from_seed(DEVELOPMENT_SEED + i) for i in range(40))
            for question in scene.questions()
        ]
        rates = accuracy(model, processor, questions)
        return ", ".join(f"{name} {value:.2f}" for name, value in rates.items())

    train(
        "vision",
        trainable_parts(model),
        lambda step: question_loss(model, processor, training_scenes(step, batch)),
        steps=steps,
        learning_rate=learning_rate,
        folder=folder,
        after_step=after_step,
    )


def train_everyday(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Then, for a while, also everyday requests beside noise, which should not change the answer.

    Tower and projector (float32), in place. What is kept is the mean of before and after.
    """
    trained = trainable_parts(model)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    requests = everyday_requests(read_phrases())[: EVERYDAY_STEPS * EVERYDAY]
    answers = own_answers(model, processor, requests, folder / "everyday.json")

    def loss_at(step: int) -> torch.Tensor:
        first = step * EVERYDAY
        rng = random.Random(f"noise-{step}")
        asked = [requests[first + i] for i in range(EVERYDAY)]
        return question_loss(model, processor, training_scenes(STEPS + step, BATCH // 2)) + (
            everyday_loss(
                model,
                processor,
                [(phrase.request(rng), answers[phrase.text]) for phrase in asked],
                [noise_image(_FIRST_SCENE + first + i) for i in range(EVERYDAY)],
            )
        )

    train(
        "everyday",
        trained,
        loss_at,
        steps=EVERYDAY_STEPS,
        learning_rate=EVERYDAY_LEARNING_RATE,
        folder=folder,
    )
    for name, parameter in trained.items():
        parameter.data.lerp_(before[name], 0.5)


def training_scenes(step: int, count: int) -> list[Scene]:
    """A batch with as many digits as words as images of shapes; the first two are the hardest."""
    kinds: dict[str, list[Scene]] = {"digit": [], "word": [], "shape": []}
    seed = _FIRST_SCENE + step * BATCH * 8  # with room to look for the rarest kind
    while any(len(scenes) < count // 3 for scenes in kinds.values()):
        scene = Scene.from_seed(seed)
        kind = "digit" if scene.digit else "word" if scene.word else "shape"
        if len(kinds[kind]) < count // 3:
            kinds[kind].append(scene)
        seed += 1
    return [scene for scenes in kinds.values() for scene in scenes]


def everyday_requests(phrases: list[Phrase]) -> list[Phrase]:
    """The harmless phrases without a single longer word that a harmful one holds, in mixed order.

    So the vision stage meets nothing about harm, not even its vocabulary.
    """

    def words(phrase: Phrase) -> set[str]:
        return {word for word in re.findall(r"[a-z]+", phrase.text.lower()) if len(word) > 4}

    alarming = set().union(*(words(phrase) for phrase in phrases if phrase.harmful))
    everyday = [p for p in phrases if not p.harmful and not words(p) & alarming]
    return random.Random("everyday").sample(everyday, len(everyday))


def everyday_loss(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pairs: list[tuple[str, str]],
    images: list[Image],
) -> torch.Tensor:
    """Mean cross-entropy of the model's own text-only answers, asked beside an image of noise.

    An image that shows nothing should not change the answer to an everyday request.
    """
    texts = [render_chat(processor, request, images=1) + answer for request, answer in pairs]
    inputs = processor(
        text=texts, images=images, return_tensors="pt", padding=True, padding_side="right"
    )
    ends = inputs["attention_mask"].sum(1)
    weights = torch.zeros(inputs["input_ids"].shape)
    for row, (_, answer) in enumerate(pairs):
        length = len(processor.tokenizer.encode(answer))
        weights[row, ends[row] - length : ends[row]] = 1 / length
    inputs, weights = inputs.to(model.device), weights.to(model.device)
    with autocast(model.device):
        states = model.model(**inputs).last_hidden_state
    return token_loss(model, states, inputs["input_ids"], weights) / len(pairs)


def answer_weights(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[float]:
    """What each token of the reply counts, 1 in all; those that name the answer count most."""
    encoded = tokenizer(f"{question.sentence}<|im_end|>", return_offsets_mapping=True)
    start = question.sentence.find(question.answer) if question.answer else -1
    stop = start + len(question.answer)
    weights = [
        _ANSWER_WEIGHT if start >= 0 and first < stop and last > start else 1.0
        for first, last in encoded["offset_mapping"]
    ]
    return [weight / sum(weights) for weight in weights]


def question_loss(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: list[Scene]
) -> torch.Tensor:
    """Mean answer cross-entropy of every question about every scene.

    All questions about an image share its tokens: each attends to the image and to itself
    only, at the positions it would have alone, so this equals asking them one at a time.
    """
    encode = processor.tokenizer.encode
    image_id = model.config.image_token_id
    opening, _ = _around_image(processor, "")
    prefix = encode(opening) + [image_id] * model.config.image_seq_length
    rows: list[tuple[list[int], list[int], list[int], list[float]]] = []
    for scene in scenes:
        row_ids, blocks = list(prefix), [0] * len(prefix)
        positions, weights = list(range(len(prefix))), [0.0] * len(prefix)
        for number, question in enumerate(scene.questions(describe=True), start=1):
            asked = encode(_around_image(processor, question.text)[1])
            answer = encode(f"{question.sentence}<|im_end|>")
            row_ids += asked + answer
            blocks += [number] * (len(asked) + len(answer))
            positions += range(len(prefix), len(prefix) + len(asked) + len(answer))
            weights += [0.0] * len(asked) + answer_weights(processor.tokenizer, question)
        rows.append((row_ids, blocks, positions, weights))
    width = max(len(row[0]) for row in rows)

    def padded(column: int) -> torch.Tensor:
        values = [[*row[column], *[0] * (width - len(row[0]))] for row in rows]
        return torch.tensor(values, device=model.device)

    ids, block, position, weight = map(padded, range(4))
    lengths = torch.tensor([len(row[0]) for row in rows], device=model.device)
    order = torch.arange(width, device=model.device)
    real = order < lengths[:, None]
    seen = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    seen = seen & (order[None, None, :] <= order[None, :, None]) & real[:, None, :]
    # padding sees itself, lest softmax divide by 0
    seen |= torch.eye(width, dtype=torch.bool, device=model.device)

    with autocast(model.device):
        features = model.model.get_image_features(
            pixels(processor, scenes).to(model.device), return_dict=True
        ).pooler_output
        features = torch.cat(list(features))
        embeddings = model.get_input_embeddings()(ids)
        where = (ids == image_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(where, features.to(embeddings.dtype))
        states = model.model.language_model(
            inputs_embeds=embeddings, attention_mask=seen[:, None], position_ids=position
        ).last_hidden_state
    asked_in_all = sum(len(scene.questions(describe=True)) for scene in scenes)
    return token_loss(model, states, ids, weight) / asked_in_all


def _around_image(processor: LlavaProcessor, question: str) -> tuple[str, str]:
    """What the chat template writes before and after the image of a question."""
    before, after = render_chat(processor, question, images=1).split(processor.image_token)
    return before, after


@torch.inference_mode()
def accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: list[tuple[Scene, Question]],
) -> dict[str, float]:
    """Share of right answers, overall and for each attribute."""
    # torch copies a frozen output layer once for every row of a prompt, many gigabytes of it
    model.lm_head.requires_grad_(True)
    right: dict[str, list[bool]] = {name: [] for name in ("overall", *ATTRIBUTES)}
    for start in range(0, len(questions), 64):
        rows = questions[start : start + 64]
        prompts = [render_chat(processor, question.text, images=1) for _, question in rows]
        images = [scene.render() for scene, _ in rows]
        inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
        with autocast(model.device):
            output = model.generate(**inputs.to(model.device), max_new_tokens=14, do_sample=False)
        replies = processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for (_, question), reply in zip(rows, replies, strict=True):
            correct = answers_correctly(question, reply)
            right["overall"].append(correct)
            right[question.attribute].append(correct)
    model.lm_head.requires_grad_(False)
    return {name: sum(rows) / len(rows) for name, rows in right.items() if rows}
