"""Refusal's words as data, one language a file."""

from __future__ import annotations

from vlm_safeguard.evaluation.judges.languages.arabic import ARABIC
from vlm_safeguard.evaluation.judges.languages.chinese import CHINESE
from vlm_safeguard.evaluation.judges.languages.english import ENGLISH
from vlm_safeguard.evaluation.judges.languages.french import FRENCH
from vlm_safeguard.evaluation.judges.languages.german import GERMAN
from vlm_safeguard.evaluation.judges.languages.hindi import HINDI
from vlm_safeguard.evaluation.judges.languages.language import Language
from vlm_safeguard.evaluation.judges.languages.russian import RUSSIAN
from vlm_safeguard.evaluation.judges.languages.spanish import SPANISH

LANGUAGES: tuple[Language, ...] = (
    ENGLISH,
    SPANISH,
    CHINESE,
    ARABIC,
    HINDI,
    FRENCH,
    RUSSIAN,
    GERMAN,
)
