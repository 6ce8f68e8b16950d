"""The README's pictures of the page, with the assistant that `python app.py` starts.

Run as `python tests/space/screenshots.py`; what follows goes to app.py, such as --model FOLDER.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
PICTURES = {
    "page.en.png": (
        dict(locale="en-US", viewport=dict(width=1280, height=800), color_scheme="light"),
        ["Who are you?", "What is the capital of France?"],
    ),
    "page.zh.png": (
        dict(locale="zh-CN", viewport=dict(width=390, height=844), color_scheme="dark", device_scale_factor=2),
        ["你是谁？"],
    ),
}


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}healthz") as reply:
            return json.load(reply)["status"] == "ready"
    except OSError:
        return False


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "app.py", "--port", str(port), *sys.argv[1:]]
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"})
    IMAGES.mkdir(parents=True, exist_ok=True)
    try:
        while not ready(url):
            if server.poll() is not None:
                sys.exit("The page did not start")
            time.sleep(0.5)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium-headless-shell", args=["--no-sandbox"]
            )
            for name, (visitor, questions) in PICTURES.items():
                page = browser.new_context(**visitor).new_page()
                page.goto(url)
                page.locator("#chat .placeholder h2").wait_for()
                page.locator("#settings > button").click()
                for box, value in zip(page.locator("#settings input[type=number]").all(), ("100", "0"), strict=False):
                    box.fill(value)  # the longest answer, and the temperature: the same picture each time
                page.locator("#settings > button").click()
                for count, question in enumerate(questions, 1):
                    page.locator("#message textarea").fill(question)
                    page.keyboard.press("Enter")
                    expect(page.locator(".note")).to_have_count(count, timeout=60_000)
                    expect(page.locator("#message .submit-button")).to_be_visible(timeout=120_000)
                page.mouse.move(0, 0)
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=IMAGES / name, animations="disabled")
                print(IMAGES / name, (IMAGES / name).stat().st_size // 1000, "kB")
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
