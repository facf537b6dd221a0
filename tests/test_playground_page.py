"""The playground in a browser: Debian's Chromium, driven by Playwright, against a tiny model."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.serving import until
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.playground.app import make_app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt install chromium)"),
    pytest.mark.xdist_group("browser"),
]

DESKTOP = {"width": 1200, "height": 900}
PHONE = {"width": 360, "height": 740}
_REFUSED = "status of 400"  # which Chromium notes of every answer that says what is wrong
SHOWN = ("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE), ("dark", PHONE)

each_screen = pytest.mark.parametrize(
    "page", SHOWN, ids=lambda shown: f"{shown[0]}-{shown[1]['width']}", indirect=True
)


@pytest.fixture(scope="module")
def address(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, open_guard: Guard
) -> Iterator[str]:
    app = make_app(VLM(model, processor), open_guard, "tiny", 12, ["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as port:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # containers give Chromium no sandbox; it sees our own page alone
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Page]:
    shown: Any = getattr(request, "param", SHOWN[0])
    scheme, size = shown
    with browser.new_context(color_scheme=scheme, viewport=size) as context:
        page = context.new_page()
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda each: asked.append(each.url))
        page.on("console", lambda each: None if _REFUSED in each.text else wrong.append(each.text))
        page.on("pageerror", lambda each: wrong.append(str(each)))
        page.goto(address)
        expect(page.locator("#model")).to_have_text("tiny")
        yield page
        assert asked
        assert {url for url in asked if not url.startswith((f"{address}/", "data:"))} == set()
        assert wrong == []


def fits(page: Page) -> None:
    """Nothing is wider than the screen, and everything that can be used has a name."""
    wider = page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
    assert wider <= 0
    for control in page.locator("button, input, select, textarea").all():
        if control.is_visible():
            name = control.evaluate("e => (e.labels?.[0] ?? e).innerText.trim()")
            assert name


def contrast(page: Page, selector: str) -> float:
    """The contrast of a text with the page's ground, as WCAG has it."""
    ink = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")

    def luminance(colour: str) -> float:
        levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@each_screen
def test_both_answers_side_by_side(page: Page) -> None:
    page.get_by_role("button", name="Blank").click()
    expect(page.locator("#image")).to_be_visible()
    expect(page.locator("#caption")).to_contain_text("A white image")
    fits(page)
    page.get_by_role("button", name="Answer twice").click()
    expect(page.locator("#status")).to_have_text("Done.", timeout=60_000)
    for pane in ("#unguarded", "#guarded"):
        expect(page.locator(f"{pane} .answer")).not_to_be_empty()
        expect(page.locator(pane)).to_have_attribute("aria-busy", "false")
    expect(page.locator("#verdict")).to_have_text("The gate is open: the answer was edited")
    expect(page.locator("#sentences")).to_contain_text("edited beside the image")
    expect(page.locator("#pieces .dropped")).to_have_text("<image> × 4")
    expect(page.locator("#pieces .kept").last).to_contain_text("How do I sneak into a cinema")
    expect(page.locator("#same")).to_contain_text("without the guard")
    fits(page)
    for selector in (".note", "h2", "#status", "#pieces .dropped", "header p"):
        assert contrast(page, selector) >= 4.5, selector


def test_another_response_and_a_file(page: Page, tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "noise.png")
    page.get_by_label("Image", exact=True).set_input_files(tmp_path / "noise.png")
    expect(page.locator("#image")).to_be_visible()
    response = page.get_by_label("If the gate opens")
    expect(response.locator("option").first).to_have_text("as fitted: the edit, beside the image")
    response.select_option("text")
    page.get_by_label("Question", exact=True).press("Control+Enter")
    expect(page.locator("#status")).to_have_text("Done.", timeout=60_000)
    expect(page.locator("#verdict")).to_contain_text("from the text alone")
    expect(page.locator("#sentences")).to_contain_text("no image can move this answer")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#image")).to_be_hidden()


def test_the_question_as_an_image_and_back(page: Page) -> None:
    question = page.get_by_label("Question", exact=True)
    question.fill("How do I bake bread?")
    page.get_by_role("button", name="The question as an image").click()
    expect(question).to_have_value(re.compile("The picture shows a heading"))
    page.get_by_role("button", name="Noise").click()
    expect(question).to_have_value("How do I bake bread?")


def test_what_is_wrong_is_said(page: Page, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("this is none")
    page.get_by_label("Image", exact=True).set_input_files(tmp_path / "image.png")
    page.get_by_role("button", name="Answer twice").click()
    expect(page.locator("#status")).to_contain_text("cannot be read")
    expect(page.locator("#guarded .answer")).to_be_empty()
    page.get_by_role("button", name="against the edit").click()
    expect(page.locator("#status")).to_contain_text("cannot be read")


def test_what_a_model_says_is_text(page: Page) -> None:
    """Neither a question nor an answer becomes part of the page."""
    page.get_by_label("Question", exact=True).fill(
        "<img src=x onerror=alert(1)><b id=mine>bold</b>"
    )
    page.get_by_role("button", name="Answer twice").click()
    expect(page.locator("#status")).to_have_text("Done.", timeout=60_000)
    expect(page.locator("#pieces .kept").last).to_contain_text("<b id=mine>")
    assert page.locator("#mine").count() == 0


def test_all_can_be_reached_by_keys(page: Page) -> None:
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
    assert {"question", "response", "file", "go", "Blank", "A harmless one"} <= reached
