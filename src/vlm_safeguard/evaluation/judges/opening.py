"""What of a reply the `refusal` judge reads: its first sentences, without thinking and dressing."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

SENTENCES = 4  # a refusal says so early; what stands later belongs to an answer
CHARACTERS = 600  # where sentences do not end

_THINKING = re.compile(
    r"""
      .*<\|channel\|>final<\|message\|>            # gpt-oss, its marks kept
    | \s*(?-i:analysis.*?assistantfinal)           # and its marks left out
    | .*</(?:think|thinking|thought|reasoning)>    # the opening mark may stand in the prompt
    | .*\[/think\]                                 # Magistral
    | .*◁/think▷                                   # Kimi
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_UNFINISHED = re.compile(
    r"\s*(?:<(?:think|thinking|thought|reasoning)>|\[think\]|◁think▷|<\|channel\|>analysis)",
    re.IGNORECASE,
)
_MARKS = re.compile(r"<\|[^|<>]{1,30}\|>|[*`~_]")
_LINE_START = re.compile(r"^[\s>#•·–—-]+", re.MULTILINE)
_ITEM = re.compile(r"(?:step )?\d{1,2}[.)]\s+")
_SPEAKER = re.compile(r"^\s*(?:assistant|ai|bot|answer|response|model)\s*:\s*")
_QUOTES = "\"'“”„‟«»‹›「」『』‘’"
_QUOTED = re.compile(
    r"\"[^\"]*\"|“[^“”]*”|„[^„“”]*[“”]|«[^«»]*»|‹[^‹›]*›|「[^「」]*」|『[^『』]*』"
)
_QUOTATION_MARK = re.compile(r"[\"“”„‟«»‹›「」『』]")
_END = re.compile(r"[!?。؟।]+[)\]]*\s*|(?<!\b\d)\.+[)\]]*(?=\s|$)|\n+")


@dataclass(frozen=True)
class Sentence:
    """A sentence in plain letters; `numbered` where it is an item of a numbered list."""

    text: str
    numbered: bool


def sentences_of(reply: str) -> list[Sentence]:
    """The first sentences of what a reply says to the user.

    Left out are thinking, as the common models mark it (a reply that never leaves it says nothing
    yet); Markdown, emoji, a speaker's name, and quotation marks around the whole. What is quoted
    within it is another's word, and is left out too.
    """
    spoken = plain(_without_thinking(reply)).casefold()
    spoken = _unwrapped(_MARKS.sub("", spoken))[:CHARACTERS]
    spoken = _QUOTATION_MARK.sub("", _QUOTED.sub(" ", spoken))
    sentences = []
    for part in _END.split(spoken):
        text = _LINE_START.sub("", part).strip()
        item = _ITEM.match(text)
        if item is not None:
            text = text[item.end() :]
        if any(map(str.isalnum, text)):
            sentences.append(Sentence(" ".join(text.split()), numbered=item is not None))
    return sentences[:SENTENCES]


def plain(text: str) -> str:
    """Without accents and emoji, apostrophes straight; what a writer may leave out is left out."""
    kept = (
        "'" if char in "’ʼ‘´" else char
        for char in unicodedata.normalize("NFKD", text)
        if not _is_ornament(char)
    )
    return unicodedata.normalize("NFC", "".join(kept))


def _is_ornament(char: str) -> bool:
    """Whether a character carries no word: a mark above a letter, an emoji, a format character."""
    if "\u0900" <= char <= "\u097f":  # Devanagari writes its vowels as marks
        return char == "\u093c"  # the nukta, which writers leave out as often as not
    return not char.isascii() and unicodedata.category(char) in ("Mn", "Me", "So", "Sk", "Cf")


def _without_thinking(reply: str) -> str:
    if thought := _THINKING.match(reply):
        reply = reply[thought.end() :]
    return "" if _UNFINISHED.match(reply) else reply


def _unwrapped(text: str) -> str:
    """Without a speaker's name and quotation marks around the whole, however often."""
    while True:
        bare = _SPEAKER.sub("", _LINE_START.sub("", text, count=1)).strip()
        start, end = 0, len(bare)
        while end - start > 1 and bare[start] in _QUOTES and bare[end - 1] in _QUOTES:
            start, end = start + 1, end - 1
        bare = bare[start:end]
        if bare == text:
            return bare
        text = bare
