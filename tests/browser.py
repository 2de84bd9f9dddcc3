"""Headless Chromium, driven over two pipes by its own protocol: what a page looks like, what it asks for and what it complains of."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Where Chromium is, None where there is none.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

#: Without the network's own chatter: it may connect to nobody.
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
# Chromium reads its orders from descriptor 3 and answers on 4.
_LAUNCH = """
import fcntl, os, sys
r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(r, 3)
os.dup2(w, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One browser. `requests`: every URL that its pages asked for; `complaints`: errors and warnings of the console."""

    def __init__(self, orders: Any, answers: Any) -> None:
        self._orders, self._answers = orders, answers
        self._number = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def show(self, page: Path, width: int, dark: bool = False, height: int = 900, media: str = "screen") -> None:
        """Loads a page as on a screen so many CSS pixels wide; returns when it has loaded."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 640)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setEmulatedMedia", media=media, features=scheme)
        self._events.clear()
        self._ask("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._take()

    def ask(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, whole: bool = True) -> bytes:
        """A PNG of the page."""
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def close(self) -> None:
        self._session = None
        self._ask("Browser.close")

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        order: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            order["sessionId"] = self._session
        self._orders.write(json.dumps(order).encode() + b"\0")
        self._orders.flush()
        while (answer := self._take()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _take(self) -> dict[str, Any]:
        message = b""
        while not message.endswith(b"\0"):
            byte = self._answers.read(1)
            assert byte, "Chromium has ended"
            message += byte
        found: dict[str, Any] = json.loads(message[:-1])
        method, said = found.get("method"), found.get("params", {})
        if method is not None:
            self._events.append(found)
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([one.get("value") for one in said["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"]["text"])
        return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A new Chromium with a profile of its own, gone afterwards."""
    assert CHROMIUM is not None
    ours, theirs = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [sys.executable, "-c", _LAUNCH, str(ours[0]), str(theirs[1]), CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"]
        with open(ours[1], "wb") as orders, open(theirs[0], "rb") as answers:
            # A sanitizer's library is for Python alone.
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            try:
                process = subprocess.Popen(command, pass_fds=(ours[0], theirs[1]), env=environment, **quiet)
            finally:
                os.close(ours[0])
                os.close(theirs[1])
            try:
                found = Browser(orders, answers)
                yield found
                found.close()
                process.wait(timeout=60)
            finally:
                process.kill()
                process.wait()
