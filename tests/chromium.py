"""Headless Chromium by the Chrome DevTools protocol over two pipes: a page to load, ask and press keys on.

The protocol: https://chromedevtools.github.io/devtools-protocol; a message is JSON that ends with a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
)
PATIENCE = 20  # seconds


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of a browser.

    Attributes:
        complaints: what the page wrote to its console as an error, was refused by its policy, or threw.
    """

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._buffer, self._last, self._session = b"", 0, None
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Its result. Events that come meanwhile are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self, patience: float = PATIENCE) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], patience)
            assert ready, "the browser says nothing"
            data = os.read(self._from, 2**16)
            assert data, "the browser is gone"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, given = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(given["exceptionDetails"].get("exception", {}).get("description", "thrown"))
        elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.complaints.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and given["type"] == "error":
            self.complaints.append(str(given["args"]))
        if method:
            self._events.append(message)
        return message

    def wait_for(self, method: str, **wanted: Any) -> dict[str, Any]:
        """The next event of a kind, or one that came since the last call."""
        while True:
            for place, event in enumerate(self._events):
                if event["method"] == method and wanted.items() <= event["params"].items():
                    del self._events[: place + 1]
                    return event["params"]
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, awaited if it is a promise."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Until JavaScript is true, looked at whenever the page draws a frame."""
        found = self.evaluate(
            f"""new Promise((done) => {{
              const end = performance.now() + {1000 * PATIENCE};
              const look = () => {{
                let value = false;
                try {{ value = Boolean({condition}); }} catch {{}}
                if (value || performance.now() > end) done(value);
                else setTimeout(look, 15);
              }};
              look();
            }})"""
        )
        assert found, f"never true: {condition}"

    def prefer(self, **wishes: str) -> None:
        """Media features, e.g. color_scheme="dark"."""
        features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in wishes.items()]
        self.command("Emulation.setEmulatedMedia", features=features)

    def open(self, address: str, *, width: int = 1280, height: int = 900, phone: bool = False) -> None:
        """Load an address; one that differs in its hash alone loads nothing, and would be waited for in vain."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.command("Emulation.setDeviceMetricsOverride", mobile=phone, **size)
        self.command("Emulation.setTouchEmulationEnabled", enabled=phone)
        self._events.clear()
        self.complaints.clear()
        self.command("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, told by its name (Tab, ArrowRight, Enter, Escape)."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = {"text": "\r"} if key == "Enter" else {}
        known = {"key": key, "code": key, "windowsVirtualKeyCode": code[key], "modifiers": 8 if shift else 0}
        self.command("Input.dispatchKeyEvent", type="keyDown", **known, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", **known)

    def write(self, text: str) -> None:
        self.command("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a new browser, whose folder is `profile`; all its processes end with it."""
    program = find_chromium()
    assert program is not None
    theirs_read, ours_write = os.pipe()
    ours_read, theirs_write = os.pipe()
    # The browser reads from descriptor 3 and writes to 4, whatever numbers the pipes have here.
    script = f'exec "$@" 3<&{theirs_read} 4>&{theirs_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, "browser", program, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
        pass_fds=(theirs_read, theirs_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs_read)
    os.close(theirs_write)
    try:
        yield Page(ours_write, ours_read)
    finally:
        os.close(ours_write)  # which ends the browser
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours_read)
