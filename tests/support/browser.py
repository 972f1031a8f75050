"""A real Chromium without a window, driven through chromedriver's own protocol (W3C WebDriver): what a page test needs.

Debian: apt-get install chromium chromium-driver. Not a general client: elements by CSS, text, keys, scripts.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

HOST = "127.0.0.1"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element
ENTER = "\ue007"
START_TIMEOUT_S = 60.0
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=900,1000",
)  # fmt: skip


@dataclass(frozen=True)
class Browser:
    """One window. `url` is the session's."""

    url: str

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET without a body, else POST; what the protocol calls `value`."""
        method = "GET" if body is None else "POST"
        reply = httpx.request(method, f"{self.url}/{path}", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()["value"]

    def open(self, address: str) -> None:
        self.call("url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script `return`s."""
        return self.call("execute/sync", {"script": script, "args": list(arguments)})

    def _find(self, css: str) -> str:
        return str(self.call("element", {"using": "css selector", "value": css})[ELEMENT])

    def write(self, css: str, text: str) -> None:
        """Types, as a person would."""
        self.call(f"element/{self._find(css)}/value", {"text": text})

    def click(self, css: str) -> None:
        self.call(f"element/{self._find(css)}/click", {})

    def texts(self, css: str) -> list[str]:
        """The text of each element, as it stands in the page."""
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css))

    def wait_for(self, what: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        """What the function returns as soon as that is true."""
        deadline = time.monotonic() + timeout_s
        while not (found := what()):
            assert time.monotonic() < deadline, self.run("return document.body.innerText")
            time.sleep(0.02)
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A fresh one, with nothing of other sessions; skips the test where there is none."""
    driver, program = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or program is None:
        pytest.skip("no browser (Debian: apt-get install chromium chromium-driver)")
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    log = (folder / "chromedriver.log").open("w")
    process = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=subprocess.STDOUT)
    opened: Browser | None = None
    try:
        opened = start(f"http://{HOST}:{port}", program, folder / "profile")
        yield opened
    finally:
        if opened is not None:  # a driver that is ended before its session leaves Chromium behind
            with suppress(httpx.HTTPError):
                httpx.delete(opened.url, timeout=30)
        process.terminate()
        process.wait(30)
        log.close()


def start(driver: str, program: str, profile: Path) -> Browser:
    deadline = time.monotonic() + START_TIMEOUT_S
    options = {"binary": program, "args": [*OPTIONS, f"--user-data-dir={profile}"]}
    wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
    while True:
        try:
            reply = httpx.post(f"{driver}/session", json=wanted, timeout=START_TIMEOUT_S)
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "chromedriver does not listen"
            time.sleep(0.1)
    assert reply.status_code == 200, reply.text
    return Browser(f"{driver}/session/{reply.json()['value']['sessionId']}")
