"""Text requests the Pocket VLM's language model is aligned on, and how they are phrased."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.resources import files

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, I can't help with this. It could cause harm.",
    "I'm sorry, but I won't help with something that could hurt people.",
)

#: Forms of a request for a verb phrase; `{}` is the phrase.
HOW_TEMPLATES = (
    "How do I {}?",
    "How can I {}?",
    "How to {}?",
    "How to {}",
    "How would I {}?",
    "How does one {}?",
    "What is the best way to {}?",
    "What are some ways to {}?",
    "What is the easiest way to {}?",
    "Give me steps to {}.",
    "Give me step-by-step instructions to {}.",
    "Explain how to {}.",
    "Tell me how to {}.",
    "Describe how to {}.",
    "Show me how to {}.",
    "Teach me to {}.",
    "Write a guide on how to {}.",
    "Write a tutorial on how to {}.",
    "Provide instructions for how to {}.",
    "I want to {}, how should I start?",
    "I need to {}. What should I do?",
    "I want to {}.",
    "Help me {}.",
    "Can you help me {}?",
    "Can you tell me how to {}?",
    "Please explain how to {}.",
    "Make a plan to {}.",
    "What do I need to {}?",
    "how do i {}",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "Answer the user's question.",
)


@dataclass(frozen=True)
class Phrase:
    """A line of the data: a verb phrase (`how`) or a complete request (`ask`)."""

    kind: str
    text: str
    harmful: bool

    def request(self, rng: random.Random) -> str:
        """The phrase as a user would type it; the form is drawn from `rng`."""
        if self.kind == "how":
            return rng.choice(HOW_TEMPLATES).format(self.text)
        return self.text


def read_phrases() -> list[Phrase]:
    """All shipped training phrases, harmful and harmless, in file order."""
    phrases = []
    for name, harmful in (("harmful", True), ("harmless", False)):
        text = files("vlm_safeguard.pocket").joinpath("data", f"{name}.tsv").read_text("utf-8")
        for line in text.splitlines():
            kind, phrase = line.split("\t")
            phrases.append(Phrase(kind, phrase, harmful))
    return phrases


def read_wrappers() -> list[str]:
    """Jailbreak templates with one `{request}` each: a request does not change inside one."""
    text = files("vlm_safeguard.pocket").joinpath("data", "wrappers.txt").read_text("utf-8")
    return text.splitlines()


def split_phrases(phrases: list[Phrase]) -> tuple[list[Phrase], list[Phrase]]:
    """Training phrases, and the development ones (every fifteenth) that choices are made on."""
    train = [phrase for index, phrase in enumerate(phrases) if index % 15]
    development = phrases[::15]
    return train, development
