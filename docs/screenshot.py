"""Makes `playground.png`: the playground of the Pocket VLM, in Debian's Chromium.

    python docs/screenshot.py

It fits a guard for the Pocket VLM if there is none yet, and takes half a minute with one.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

_SIZE = (1100, 1180)


def main() -> None:
    """Ask the page's own first question beside a blank image, and keep what it shows."""
    command = [sys.executable, "-m", "vlm_safeguard.cli", "playground", "pocket", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            lines = (re.search(r"Open (\S+) in", line) for line in server.stderr)
            address = next(match[1] for match in lines if match)
            shot(address, Path(__file__).with_name("playground.png"))
        finally:
            server.terminate()


def shot(address: str, path: Path) -> None:
    """A PNG of few colours."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": _SIZE[0], "height": _SIZE[1]})
        page.goto(address)
        page.get_by_role("button", name="Blank").click()
        expect(page.locator("#image")).to_be_visible()
        page.get_by_role("button", name="Answer twice").click()
        expect(page.locator("#status")).to_have_text("Done.", timeout=300_000)
        shown = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        browser.close()
    shown.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)


if __name__ == "__main__":
    main()
