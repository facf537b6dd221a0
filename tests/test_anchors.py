"""Anchors and calibration requests are read strictly, and every refusal names its line."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pytest

from vlm_safeguard.anchors import (
    MINIMUM_PAIRS,
    Anchor,
    fingerprint,
    read_anchors,
    read_requests,
    shipped_anchors,
    shipped_calibration,
)
from vlm_safeguard.errors import SafeguardError

PAIRS = [Anchor(f'How to break "{i}", twice', f"How to bake {i} — café") for i in range(10)]


def write_csv(path: Path, pairs: list[Anchor], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow(["id", "harmful", "harmless"])
        writer.writerows([i, pair.harmful, pair.harmless] for i, pair in enumerate(pairs))
    return path


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def test_shipped_anchors_are_pairs_of_one_form() -> None:
    anchors = shipped_anchors()
    assert len(anchors) >= 100
    texts = [text for a in anchors for text in (a.harmful, a.harmless)]
    assert all(text.startswith("How to ") for text in texts)
    assert len(set(texts)) == len(texts)


def test_calibration_requests_are_not_anchors() -> None:
    calibration = shipped_calibration()
    assert len(set(calibration)) == len(calibration) >= 200
    assert not set(calibration) & {t for a in shipped_anchors() for t in (a.harmful, a.harmless)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_comes_back(tmp_path: Path, encoding: str) -> None:
    assert read_anchors(write_csv(tmp_path / "a.csv", PAIRS, encoding)) == PAIRS


def test_csv_text_of_two_lines_comes_back(tmp_path: Path) -> None:
    pairs = [*PAIRS, Anchor("How to break\na window", "How to clean\na window")]
    assert read_anchors(write_csv(tmp_path / "a.csv", pairs)) == pairs


def test_jsonl_comes_back(tmp_path: Path) -> None:
    records: list[object] = [{"harmful": p.harmful, "harmless": p.harmless} for p in PAIRS]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    path.write_text(path.read_text("utf-8").replace("\n", "\n\n"), "utf-8")  # blank lines
    assert read_anchors(str(path)) == PAIRS


def test_jsonl_text_with_a_line_separator_comes_back(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one\u2028two"}, {"text": "three\x85"}])
    assert read_requests(path) == ["one\u2028two", "three"]


def test_texts_are_stripped(tmp_path: Path) -> None:
    assert read_requests(write_jsonl(tmp_path / "r.jsonl", [{"text": "  Hi \n"}])) == ["Hi"]


def lines(*changed: tuple[int, str]) -> str:
    """Ten good JSONL records, some lines of which are replaced (line 1 is the first)."""
    rows = [json.dumps({"harmful": f"bad {i}", "harmless": f"good {i}"}) for i in range(1, 11)]
    for line, text in changed:
        rows[line - 1] = text
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines((3, "{")), "line 3: not JSON"),
        ("a.jsonl", lines((4, "[1]")), "line 4: not a JSON object"),
        ("a.jsonl", lines((5, '{"harmful": "x"}')), "line 5: 'harmless' is missing or empty"),
        ("a.jsonl", lines((6, '{"harmful": " ", "harmless": "x"}')), "line 6: 'harmful' is mis"),
        ("a.jsonl", lines((7, '{"harmful": 3, "harmless": "x"}')), "line 7: 'harmful' is missing"),
        ("a.jsonl", lines((8, '{"harmful": "x", "harmless": " x "}')), "line 8: .* are the same"),
        ("a.jsonl", lines((9, '{"harmful": "bad 2", "harmless": "good 2"}')), "9: repeats line 2"),
        ("a.jsonl", "\n".join(lines().split("\n")[: MINIMUM_PAIRS - 1]), "holds 7 anchor pairs"),
        ("a.csv", "harmful,harmless\na,b\nc,d,e\n", "line 3: more fields than the header"),
        ("a.csv", "harmful,harmless\na,b\nc\n", "line 3: 'harmless' is missing"),
        ("a.csv", "harmful;harmless\na;b\n", "line 2: 'harmful' is missing"),
        ("a.csv", 'harmful,harmless\n"a" b,c\n', "line 2: "),
        ("a.txt", "a\tb\n", "expected a .csv or .jsonl"),
    ],
)
def test_bad_files_are_refused_by_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content, "utf-8")
    with pytest.raises(SafeguardError, match=message):
        read_anchors(path)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(SafeguardError, match="There is no file"):
        read_requests(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"text\n\xff\xfe\xfa\n")
    with pytest.raises(SafeguardError, match="cannot be read as UTF-8"):
        read_requests(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("text\n")
    with pytest.raises(SafeguardError, match="holds no requests"):
        read_requests(tmp_path / "c.csv")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(SafeguardError, match="cannot be read"):
        read_requests(tmp_path / "d.csv")


def test_fingerprint_is_the_hash_of_the_texts_in_order() -> None:
    expected = hashlib.sha256(b'["a", "\xc3\xa9"]').hexdigest()
    assert fingerprint(["a", "é"]) == expected
    assert fingerprint(["é", "a"]) != expected
    assert fingerprint(["aé"]) != expected
    assert fingerprint([Anchor("a", "b")]) == hashlib.sha256(b'[["a", "b"]]').hexdigest()
    assert fingerprint([Anchor("b", "a")]) != fingerprint([Anchor("a", "b")])
