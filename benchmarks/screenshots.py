"""Pictures of the live view for docs/images, of a real server answering a real question.

Needs `pip install -e ".[slow]"` and Debian's chromium.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
QUESTION = "A farmer has 12 cows and buys 5 more. How many cows does the farmer have?"
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 860}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 860}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 390, "height": 1560}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    command = ["moe_infinity.cli", "serve", "--port", "0", "--ram-slots", "100"]
    start = "import sys; from moe_infinity.cli import main; sys.argv = sys.argv[1:]; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", start, *command], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        line = next(line for line in server.stderr if " at http://" in line)
        take(line.split(" at ")[1].split(": ")[0], args.browser)
    finally:
        server.terminate()
        server.wait()


def take(url: str, browser: str) -> None:
    from playwright.sync_api import sync_playwright

    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, options in VIEWS.items():
            page = opened.new_page(**options)
            page.goto(url)
            box = page.locator("textarea").first
            for _ in range(2):
                box.fill(QUESTION)
                box.press("Enter")
                page.wait_for_timeout(4_000)  # charts grow with time
            page.screenshot(path=IMAGES / f"live-{name}.png")
            page.close()
        opened.close()


if __name__ == "__main__":
    main()
