"""`samples.jsonl`, and `attacked.jsonl` of attacked requests: one line an answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.attempt import Attempt
from vlm_safeguard.evaluation.asks.samples import Kind
from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.results.validation import first_error

Place = tuple[str, str, str]  # benchmark, condition, sample


class KeptReceipt(BaseModel):
    """A receipt, whole, as the version of the guard that gave it wrote it.

    Attributes:
        guarded: whether the request was edited, which every version says.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    guarded: bool


class Line(BaseModel):
    """One answer: what was asked, how it was defended, and what was measured of it.

    Attributes:
        sample: the request's name in its benchmark.
        condition: the image condition.
        image: the image that was shown, relative to the evaluation's folder.
        tokens: new tokens of the answer.
        seconds: of its batch, divided among the batch's answers.
        receipt: what the guard did; None without a guard.
        verdicts: by judge; none of a utility question.
        correct: whether a utility question was answered right; None of other requests.
        nll: negative log-likelihood of the answer behind its bare request, in nats.
        nll_tokens: tokens that `nll` is a sum over.
        attempt: how it was asked under an attack; None in `samples.jsonl`.
    """

    model_config = ConfigDict(frozen=True)

    benchmark: str
    sample: str
    kind: Kind
    category: str = ""
    condition: str
    defence: str
    request: str
    image: str | None = None
    answer: str
    tokens: int | None = None
    seconds: float | None = None
    receipt: KeptReceipt | None = None
    verdicts: dict[str, Verdict] = {}
    correct: bool | None = None
    nll: float | None = None
    nll_tokens: int | None = None
    attempt: Attempt | None = None

    @property
    def place(self) -> Place:
        """What it answers; the same for every defence."""
        return self.benchmark, self.condition, self.sample

    @property
    def perplexity(self) -> float | None:
        """exp(nll / tokens); None where it was not measured, or no token was."""
        if self.nll is None or not self.nll_tokens:
            return None
        mean = self.nll / self.nll_tokens
        return math.exp(mean) if mean < 709 else math.inf

    @property
    def disputed(self) -> bool:
        """Whether two judges that could be read differ on whether the attack succeeded."""
        return len({v.succeeded for v in self.verdicts.values() if v.readable}) > 1

    def verdict(self, judge: str) -> Verdict:
        """A judge's verdict; one that says nothing where it was not asked."""
        return self.verdicts.get(judge, Verdict(refused=None, unsafe=None))


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, in its order.

    Raises:
        SafeguardError: the file cannot be read, and in which line.
    """
    lines = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    lines.append(Line.model_validate_json(text))
                except ValidationError as error:
                    raise SafeguardError(
                        f"{path}, line {number}, cannot be read: {first_error(error)}"
                    ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SafeguardError(f"{path} cannot be read: {error}") from error
    return lines


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Write a file that `read_lines` reads."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line.model_dump_json() + "\n" for line in lines)
