"""Headless Chromium by way of its DevTools pipe: what a page does, not only what it says. No WebSocket library is needed."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1100,900",
         "--remote-debugging-pipe")


def missing_chromium() -> str | None:
    """Why there is no browser to test in, or None where there is."""
    return None if shutil.which("chromium") else "needs chromium on the PATH (Debian: apt-get install chromium)"


class Browser:
    """One page of a browser with a profile of its own. Use as a context manager.

    Attributes:
        requests: addresses that the page asked for.
        errors: exceptions and security violations that the console saw.
    """

    def __init__(self, profile: Path, patience: float = 60.0) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.patience, self._last, self._left = patience, 0, b""
        down, up = os.pipe(), os.pipe()
        far = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (down[0], up[1])]  # clear of 3 and 4, where Chromium looks

        def connect() -> None:
            os.dup2(far[0], 3)
            os.dup2(far[1], 4)

        self._process = subprocess.Popen(["chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"], pass_fds=(3, 4),
                                         preexec_fn=connect, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (down[0], up[1], *far):
            os.close(fd)
        self._write, self._read = down[1], up[0]
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, address: str) -> None:
        """Load a page and wait until it is complete."""
        self._send("Page.navigate", url="about:blank")  # another fragment alone would not load it again
        self._send("Page.navigate", url=address)
        end = time.monotonic() + self.patience
        while self.run("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, f"{address} was not loaded in {self.patience} s"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        reply = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def text(self, identity: str) -> str:
        """The text of the element with this id."""
        return self.run(f"document.getElementById('{identity}').textContent")

    def press(self, key: str) -> None:
        """One key, down and up, to whatever has the focus."""
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, key=key)

    def dark(self, on: bool) -> None:
        """What the page hears of the reader's colour scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._last:
                assert "error" not in reply, reply["error"]
                return reply["result"]
            self._notice(reply.get("method", ""), reply.get("params", {}))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._read], [], [], self.patience)[0], f"Chromium said nothing for {self.patience} s"
            more = os.read(self._read, 1 << 16)
            assert more, "Chromium has ended"
            self._left += more
        message, self._left = self._left.split(b"\0", 1)
        return json.loads(message)

    def _notice(self, event: str, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"].get("exception", about["exceptionDetails"])))
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])
