"""Benign synthetic images and questions about them: all the Pocket VLM ever sees of images.

A scene is drawn from a seed alone, so a data set is a range of seeds: training uses seeds below
`HELD_OUT_SEED`, evaluation the ones from it on.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels; the side of a rendered image
HELD_OUT_SEED = 10_000_000

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 20),
    "black": (25, 25, 25),
    "grey": (140, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
POSITIONS = {
    "left": (0.24, 0.5),
    "right": (0.76, 0.5),
    "top": (0.5, 0.24),
    "bottom": (0.5, 0.76),
    "centre": (0.5, 0.5),
}
COUNTS = ("one", "two", "three", "four", "five")
DIGITS = tuple("0123456789")
WORDS = (
    *("cat", "dog", "sun", "tree", "fish", "book", "star", "milk"),
    *("lamp", "rain", "door", "ship", "bird", "cake", "moon", "ball"),
)

#: Every attribute a scene can be asked for, with the answers it can have.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "position": tuple(POSITIONS),
    "count": COUNTS,
    "digit": DIGITS,
    "word": WORDS,
}

#: Other ways of writing a value.
_MEANT = {
    **{str(number): word for number, word in enumerate(COUNTS, start=1)},
    **{f"{shape}s": shape for shape in SHAPES if shape != "cross"},
    "crosses": "cross",
}

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": (
        "What shape is this?",
        "Which shape is in the picture?",
        "What is the shape in the image?",
        "Name the shape shown here.",
    ),
    "colour": (
        "What colour is it?",
        "Which colour is used in the picture?",
        "What colour is shown in the image?",
        "Name the colour you see.",
    ),
    "position": (
        "Where is the shape?",
        "In which part of the picture is the shape?",
        "Where in the image is it?",
        "Tell me the position of the shape.",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes are in the picture?",
        "Count the shapes in the image.",
        "What is the number of shapes?",
    ),
    "digit": (
        "Which digit is written here?",
        "What number is in the picture?",
        "Read the digit in the image.",
        "What digit do you see?",
    ),
    "word": (
        "Which word is written here?",
        "What word is in the picture?",
        "Read the word in the image.",
        "What does the text say?",
    ),
}
_DESCRIBE = (
    "Describe the picture.",
    "What is in this image?",
    "What do you see?",
    "Tell me about this picture.",
)


@dataclass(frozen=True)
class Question:
    """One question about a scene. `answer` is the word looked for, `sentence` the full reply."""

    attribute: str
    text: str
    answer: str
    sentence: str


@dataclass(frozen=True)
class Scene:
    """What an image shows: shapes of one kind and colour, or a written digit or word."""

    seed: int
    colour: str
    shape: str | None = None
    position: str | None = None
    count: str | None = None
    digit: str | None = None
    word: str | None = None

    @classmethod
    def from_seed(cls, seed: int) -> Scene:
        """The scene number `seed`; the same on every machine."""
        rng = random.Random(f"scene-{seed}")
        colour = rng.choice(list(COLOURS))
        kind = rng.choices(("single", "several", "digit", "word"), weights=(4, 3, 2, 3))[0]
        if kind == "digit":
            return cls(seed, colour, digit=rng.choice(DIGITS))
        if kind == "word":
            return cls(seed, colour, word=rng.choice(WORDS))
        shape = rng.choice(SHAPES)
        if kind == "single":
            return cls(seed, colour, shape, position=rng.choice(list(POSITIONS)), count="one")
        return cls(seed, colour, shape, count=rng.choice(COUNTS[1:]))

    def render(self) -> Image.Image:
        """The image, RGB, `SIZE` × `SIZE` pixels."""
        rng = random.Random(f"pixels-{self.seed}")
        scale = 4  # draw large and shrink, for smooth edges
        side = SIZE * scale
        paper = tuple(rng.randint(225, 255) for _ in range(3))
        image = Image.new("RGB", (side, side), paper)
        draw = ImageDraw.Draw(image)
        ink = tuple(
            max(0, min(255, channel + rng.randint(-15, 15))) for channel in COLOURS[self.colour]
        )
        written = self.digit or self.word
        if written is not None:
            self._write(draw, written, ink, side, rng)
        elif self.position is not None:
            x, y = POSITIONS[self.position]
            jitter = [rng.uniform(-0.04, 0.04) for _ in range(2)]
            radius = rng.uniform(0.13, 0.19) * side
            self._draw_shape(draw, ((x + jitter[0]) * side, (y + jitter[1]) * side), radius, ink)
        else:
            assert self.count is not None
            cells = rng.sample(range(9), COUNTS.index(self.count) + 1)
            for cell in cells:
                centre = [
                    (index + 0.5 + rng.uniform(-0.08, 0.08)) / 3 * side for index in divmod(cell, 3)
                ]
                self._draw_shape(draw, (centre[0], centre[1]), rng.uniform(0.1, 0.13) * side, ink)
        return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)

    def _draw_shape(
        self,
        draw: ImageDraw.ImageDraw,
        centre: tuple[float, float],
        radius: float,
        ink: tuple[int, ...],
    ) -> None:
        x, y = centre
        if self.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        elif self.shape == "square":
            half = radius * 0.9
            draw.rectangle((x - half, y - half, x + half, y + half), fill=ink)
        elif self.shape == "cross":
            arm = radius * 0.35
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=ink)
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=ink)
        else:
            corners = 3 if self.shape == "triangle" else 10
            points = []
            for corner in range(corners):
                reach = radius * (0.42 if corners == 10 and corner % 2 else 1.1)
                angle = 2 * math.pi * corner / corners - math.pi / 2
                points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
            draw.polygon(points, fill=ink)

    @staticmethod
    def _write(
        draw: ImageDraw.ImageDraw,
        text: str,
        ink: tuple[int, ...],
        side: int,
        rng: random.Random,
    ) -> None:
        share = rng.uniform(0.5, 0.7) if len(text) == 1 else rng.uniform(0.34, 0.4)
        font = ImageFont.load_default(share * side)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        free_x, free_y = side - (right - left), side - (bottom - top)
        x = free_x * rng.uniform(0.25, 0.75) - left
        y = free_y * rng.uniform(0.25, 0.75) - top
        draw.text((x, y), text, fill=ink, font=font)

    def sentences(self) -> dict[str, str]:
        """The full reply for every attribute this scene can be asked for."""
        if self.digit is not None:
            return {
                "digit": f"The picture shows the digit {self.digit}.",
                "colour": f"The digit is {self.colour}.",
            }
        if self.word is not None:
            return {
                "word": f'The picture shows the word "{self.word}".',
                "colour": f"The word is {self.colour}.",
            }
        if self.position is not None:
            return {
                "shape": f"The shape is a {self.shape}.",
                "colour": f"The shape is {self.colour}.",
                "position": f"The shape is at the {self.position} of the picture.",
                "count": "There is one shape in the picture.",
            }
        return {
            "shape": f"The shapes are {self.shape}s."
            if self.shape != "cross"
            else "The shapes are crosses.",
            "colour": f"The shapes are {self.colour}.",
            "count": f"There are {self.count} shapes in the picture.",
        }

    def description(self) -> str:
        """One sentence that names everything in the image."""
        article = "an" if self.colour == "orange" else "a"
        if self.digit is not None:
            return f"The picture shows {article} {self.colour} digit {self.digit}."
        if self.word is not None:
            return f'The picture shows the word "{self.word}" in {self.colour}.'
        if self.position is not None:
            where = f"at the {self.position}"
            return f"The picture shows {article} {self.colour} {self.shape} {where}."
        plural = "crosses" if self.shape == "cross" else f"{self.shape}s"
        return f"The picture shows {self.count} {self.colour} {plural}."

    def questions(self, *, describe: bool = False) -> list[Question]:
        """One question per attribute, its phrasing picked by the seed."""
        rng = random.Random(f"questions-{self.seed}")
        questions = [
            Question(attribute, rng.choice(_QUESTIONS[attribute]), getattr(self, attribute), reply)
            for attribute, reply in self.sentences().items()
        ]
        if describe:
            questions.append(Question("describe", rng.choice(_DESCRIBE), "", self.description()))
        return questions


def answers_correctly(question: Question, reply: str) -> bool:
    """True where `reply` names the right value of the attribute and none of its other values."""
    return names_only(reply, question.answer, ATTRIBUTES[question.attribute])


def names_only(reply: str, answer: str, choices: Sequence[str]) -> bool:
    """True where `reply` names `answer`, in any case or number, and no other of `choices`."""
    words = re.findall(r"\w+", reply.lower())
    meant = {word if word in choices else _MEANT.get(word) for word in words}
    return meant & set(choices) == {answer}
