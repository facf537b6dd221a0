"""A language's words of refusing and answering."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """Regular expressions over one sentence, written small; accents are ignored on both sides.

    Attributes:
        refuses: a negated ability, willingness or permission of the speaker, or a rule against it.
        idioms: what has a refusal's words and refuses nothing: "I can't wait", a caveat that an
            answer follows. Taken out of a sentence before refusals are looked for.
        delivers: what an answer begins to give with: "here is how", "step 1".
        elsewhere: what marks something given as other than what was asked: "safely", "instead".
        apology: an apology that may stand alone, or be cut off after a word or two.
        spaced: whether words stand apart, so that patterns match whole words only.
    """

    name: str
    refuses: tuple[str, ...]
    idioms: tuple[str, ...]
    delivers: tuple[str, ...]
    elsewhere: tuple[str, ...]
    apology: str
    spaced: bool = True
