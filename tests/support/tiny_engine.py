"""A random LLaVA of six layers in vLLM, in this process or in several, and its guard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiny.pocket import IMAGE_SIDE, make_model, make_processor
from vlm_safeguard import Guard
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.engines.vllm.offline import engine_options
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.activations import image_states, text_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import encode_chat
from vlm_safeguard.pocket.model import save
from vlm_safeguard.policy.discriminant import fit_discriminant
from vlm_safeguard.policy.gate import ImageScore, TextDiscriminant, TextScore
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.response import Response

#: vLLM's options. Those with several workers have a process for each, and one for the engine.
ENGINES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled, in chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "two ranks": {"enforce_eager": True, "tensor_parallel_size": 2},
    "two stages": {"pipeline_parallel_size": 2},  # eagerly, vLLM has none on a CPU
}
TOKENS = 6


@dataclass(frozen=True)
class Tiny:
    """A model, as transformers runs it and in a folder for vLLM, and its guard."""

    model: Any
    processor: Any
    folder: Path
    guard: Guard


def requests() -> list[str]:
    """Of several lengths and numbers of sentences, the longest of several chunks."""
    texts = [text for each in shipped_anchors()[:4] for text in (each.harmful, each.harmless)]
    return [*texts, f"{texts[1]} {texts[0]}", " ".join(texts), "Why?"]


def image_of(number: int) -> Any:
    """Of the side that the model sees: vLLM resizes images by another kernel."""
    return noise_image(number).resize((IMAGE_SIDE, IMAGE_SIDE))


def make_tiny(folder: Path) -> Tiny:
    """A gate of every criterion that reads states; each opens for some requests, not for others."""
    processor = make_processor()
    model = make_model(processor, width=128)  # heads of 32, the least that vLLM has on a CPU
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)  # as large as states of a width of 32 are
    save(model, processor, folder)
    fitted = Guard.fit(model, processor, calibration=shipped_calibration()[:100], layers=(2, 3))
    backbone, directions = Backbone.of(model), fitted.policy.directions
    anchors = shipped_anchors()[:40]
    harmful, harmless, asked = (
        [encode_chat(processor, text) for text in texts]
        for texts in ([x.harmful for x in anchors], [x.harmless for x in anchors], requests())
    )
    read = [text_states(backbone, texts) for texts in (harmful, harmless, asked)]
    states = [each for each, _ in read]
    discriminant = fit_discriminant(states[0], states[1], shrinkage=0.5)
    scores = directions.harm_scores(states[2])[:, [1, 4]].mean(1)
    told = discriminant.scores(states[2])[:, [0, 5]].mean(1)
    high = [float(each.quantile(0.65)) for each in (scores, told)]  # between two of them
    declined = int(scores.argmin())
    prefix: tuple[int, ...] = ()
    for _ in range(3):
        ids = torch.tensor([[*asked[declined], *prefix]])
        prefix += (int(model(input_ids=ids).logits[0, -1].argmax()),)
    # another refusal's first token, which leads this one's behind about as many texts as not
    with torch.no_grad():
        behind = backbone.next_token_logits(read[2][1].clone())
    leads = behind - behind[:, prefix[:1]]
    other = int((leads > 0).float().mean(0).sub(0.5).abs().argmin())
    closed = (scores <= high[0]) & (told <= high[1])
    closed[declined] = False
    images = [image_of(n) for n in range(len(asked))]
    seen = image_states(backbone, processor, requests(), images)[:, 2]
    looks = directions.harm_score(seen, 2)[closed].sort().values
    middle = len(looks) // 2
    beside = float(looks[middle - 1 : middle + 1].mean())  # between two: none is at the threshold
    likely: dict[str, Any] = {"budget": 0.1, "calibrated_on": 10}
    gate = (
        OwnRefusal(tokens=prefix[:1], slack=1.0, layers=(1, 4), score_above=1.0),
        TextScore(layers=(1, 4), threshold=high[0], **likely),
        TextDiscriminant(layers=(0, 5), threshold=high[1], **likely),
        ImageScore(layer=2, threshold=beside, **likely),
    )
    guard = fitted.variant(
        gate=gate,
        discriminant=discriminant,
        refusal_prefix=prefix,
        other_prefixes=((other, 5, 6, 7),),
        response=Response.REFUSAL,
    )
    return Tiny(model, processor, folder, guard)


@contextmanager
def engine(tiny: Tiny, guard: Guard, cache: Path, options: dict[str, Any]) -> Iterator[Any]:
    """A `vllm.LLM` made for a guard of the model.

    Args:
        cache: where vLLM keeps what it compiles; nothing was compiled before in an empty folder.
        options: vLLM's own.
    """
    own_processes = any(name.endswith("parallel_size") for name in options)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if own_processes else "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_CI_ENV": "0" if "pipeline_parallel_size" in options else "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM

    made = LLM(
        str(tiny.folder),
        **{"dtype": "float32", "max_model_len": 512, **engine_options(guard), **options},
    )
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()


def params(**more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **more})


def messages(count: int) -> list[list[dict[str, Any]]]:
    """The first requests as vLLM takes them, each beside its image."""
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": image_of(n)},
                    {"type": "text", "text": text},
                ],
            }
        ]
        for n, text in enumerate(requests()[:count])
    ]


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker
