# SPDX-License-Identifier: Apache-2.0
"""Draw docs/page.png and docs/page.gif from the page itself, in a headless Chromium.

    python -m scripts.studies.page_pictures [--question TEXT]

The race of the pictures is decoded on this machine and then played again on a clock that the program moves, so that every
frame shows a moment that happened. Needs the extras ui and dev, and Chromium.
"""

from __future__ import annotations

import io
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fastdllm.arguments import Parser, output_folder
from fastdllm.shell import one_line
from fastdllm.ui.options import SAMPLE_QUESTION

DOCS = Path(__file__).resolve().parents[2] / "docs"
WIDTH, HEIGHT = 1200, 760  # pixels
FRAMES, SECONDS, HOLD = 48, 6.0, 3.0  # of the race, and how long its end stays
COLOURS = 128


@contextmanager
def served() -> Iterator[str]:
    """The address of a server of tiny-llada in this process."""
    import uvicorn

    from fastdllm.serving.command import Settings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = Settings().app(wait_until_warm=True)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.1)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def race(page: Any, question: str) -> float:
    """Let two settings race; returns the seconds of the slower one."""
    page.locator("#message").fill(question)
    page.locator("#message").press("Enter")
    page.locator("#verdict.said").wait_for(timeout=300_000)
    page.mouse.move(WIDTH / 2, 5)
    return float(page.locator("#race-bar .moment").inner_text().split()[0])


def shot(page: Any) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")


def frames(page: Any, seconds: float) -> list[Any]:
    """The race once more, a picture at each moment."""
    page.clock.install()
    page.clock.pause_at(datetime.now() + timedelta(seconds=2))  # else it goes on while a picture is taken
    page.locator("#race-bar .pace").select_option("1")
    page.locator("#race-bar .play").click()
    out = []
    for _ in range(FRAMES):
        page.clock.run_for(1000 * seconds / FRAMES)
        out.append(shot(page))
    page.clock.run_for(2000)
    return [*out, shot(page)]


def save_moving(pictures: list[Any], path: Path) -> None:
    """One palette for all frames, so that nothing flickers and equal pixels cost nothing."""
    from PIL import Image

    palette = pictures[-1].quantize(COLOURS, dither=Image.Dither.NONE)
    flat = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [round(1000 * SECONDS / FRAMES)] * (len(flat) - 1) + [round(1000 * HOLD)]
    flat[0].save(path, save_all=True, append_images=flat[1:], duration=durations, loop=0, optimize=True, disposal=1)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--question", default=SAMPLE_QUESTION, help="what the two settings are asked")
    parser.add_argument("-o", "--output", type=output_folder, default=DOCS, metavar="FOLDER", help="where (default: docs/)")
    args = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    with served() as url, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(url)
        page.locator("body[data-ready]").wait_for()
        seconds = race(page, args.question)
        shot(page).quantize(256).save(args.output / "page.png", optimize=True)
        save_moving(frames(page, seconds), args.output / "page.gif")
        browser.close()
    for name in ("page.png", "page.gif"):
        print(f"{args.output / name}: {(args.output / name).stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    with one_line("page_pictures"):
        sys.exit(main())
