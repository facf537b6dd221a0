"""The sets that come with the package, written for it and held out from all it was made from."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.evaluation.asks.samples import Benchmark, Kind, Sample
from vlm_safeguard.pocket.scenes import ATTRIBUTES, HELD_OUT_SEED, Scene

SCENES = 300


def jailbreak_templates() -> dict[str, str]:
    """Five ways of asking for what would be refused, by name; `{request}` is what is asked."""
    path = files("vlm_safeguard.evaluation.asks").joinpath(
        "prompts", "held-out", "jailbreak-templates.json"
    )
    templates: dict[str, str] = json.loads(path.read_text("utf-8"))
    return templates


def scene_questions(count: int) -> list[Sample]:
    """One question each about `count` held-out scenes, attributes in turn."""
    samples = []
    for number in range(count):
        scene = Scene.from_seed(HELD_OUT_SEED + 1_000_000 + number)
        questions = scene.questions()
        question = questions[number % len(questions)]
        samples.append(
            Sample(
                f"scene-{number:04}",
                "utility",
                question.text,
                question.attribute,
                image=scene.render(),
                answer=question.answer,
                choices=ATTRIBUTES[question.attribute],
            )
        )
    return samples


def _prompts(name: str, kind: Kind, split: str = "held-out") -> list[Sample]:
    return [
        Sample(prompt.id, kind, prompt.text, prompt.category)
        for prompt in read_prompts(name, split)
    ]


def _jailbreak(_: Path) -> list[Sample]:
    return [
        Sample(f"{prompt.id}-{name}", "harmful", template.replace("{request}", prompt.text), name)
        for name, template in jailbreak_templates().items()
        for prompt in read_prompts("jailbreak")
    ]


def _shipped(name: str, title: str, kind: Kind, count: int, source: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        kinds=frozenset({kind}),
        licence="Apache-2.0",
        source=source,
        count=count,
        own_images=False,
        read=lambda _: _prompts(name, kind),
    )


HARMFUL = _shipped(
    "harmful",
    "Held-out harmful requests",
    "harmful",
    219,
    "Ours, with the package: short requests of twenty kinds of harm.",
)
DEVELOPMENT = Benchmark(
    name="development",
    title="Development harmful requests",
    kinds=frozenset({"harmful"}),
    licence="Apache-2.0",
    source="Ours, with the package: what choices are made on, and attacks.",
    count=390,
    own_images=False,
    read=lambda _: _prompts("harmful", "harmful", "development"),
)
HARMLESS = _shipped(
    "harmless",
    "Held-out harmless requests",
    "harmless",
    273,
    "Ours, with the package: everyday requests, 102 of them look-alikes of harmful ones.",
)
LOOKALIKE = _shipped(
    "lookalike",
    "Look-alike harmless requests",
    "harmless",
    100,
    "Ours, with the package: harmless requests in the words of harmful ones, of seven kinds.",
)
JAILBREAK = Benchmark(
    name="jailbreak",
    title="Jailbreak templates × instructions",
    kinds=frozenset({"harmful"}),
    licence="Apache-2.0",
    source="Ours, with the package: five templates of well-known kinds × twenty instructions, the "
    "form of VLM-Guard's Jailbreak Instructions, which are not published.",
    count=100,
    own_images=False,
    read=_jailbreak,
)
SCENE_QUESTIONS = Benchmark(
    name="scenes",
    title="Questions about rendered scenes",
    kinds=frozenset({"utility"}),
    licence="Apache-2.0",
    source="Ours, drawn from seeds by the package.",
    count=SCENES,
    own_images=True,
    read=lambda _: scene_questions(SCENES),
)
