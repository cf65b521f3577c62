"""A real browser, driven by the Chrome DevTools Protocol: Chromium, without a window.

Source: chromedevtools.github.io/devtools-protocol.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

from aiohttp import ClientSession

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from aiohttp import ClientWebSocketResponse

PATIENCE_S = 30.0


def find() -> str | None:
    """Where Chromium is; None: it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    """Chromium for the time of the `with` block, with a profile of its own.

    Returns:
        Where it is driven from.
    """
    command = [
        find() or "chromium",
        "--headless=new",
        "--no-sandbox",  # the tests may run as root, and open pages of ours alone
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-extensions",
        "--disable-sync",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process,
    ):
        try:
            port = folder / "DevToolsActivePort"
            deadline = time.monotonic() + PATIENCE_S
            while not (port.exists() and port.read_text().count("\n") == 1):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
        finally:
            process.terminate()


class Tab:
    """A page that is open in the browser.

    Attributes:
        complaints: what the browser has complained of: the console's errors and warnings, scripts
            that failed, and what the security policy forbade.
    """

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self.complaints: list[str] = []

    async def read(self) -> None:
        """Take what the browser says, until the page is closed."""
        async for message in self._socket:
            said = json.loads(message.data)
            if (waiting := self._answers.pop(said.get("id", 0), None)) is not None:
                waiting.set_result(said)
                continue
            told = said.get("params", {})
            match said["method"]:
                case "Page.loadEventFired":
                    self._loaded.set()
                case "Log.entryAdded" if told["entry"]["level"] in {"error", "warning"}:
                    self.complaints.append(told["entry"]["text"])
                case "Runtime.exceptionThrown":
                    self.complaints.append(str(told["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if told["type"] in {"error", "warning", "assert"}:
                    self.complaints.append(str(told["args"]))
                case "Audits.issueAdded":
                    self.complaints.append(str(told["issue"]))

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have the browser do something; it must succeed."""
        number = len(self._answers) + 1 + max(self._answers, default=0)
        waiting = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(PATIENCE_S):
            answer = await waiting
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self._loaded.clear()
        await self.send("Page.navigate", url=url)
        await self.loaded()

    async def loaded(self) -> None:
        """Wait until the page that was gone to is loaded."""
        async with asyncio.timeout(PATIENCE_S):
            await self._loaded.wait()

    async def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = await self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def press(self, key: str, text: str = "") -> None:
        """Press and release a key; whatever it leads to may not have happened yet."""
        code = {"Tab": 9, "Enter": 13}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            await self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **typed,
            )

    async def follow(self) -> None:
        """Press Enter and wait until the page that it leads to is loaded."""
        self._loaded.clear()
        await self.press("Enter", "\r")
        await self.loaded()

    async def size(self, width: int, height: int) -> None:
        """Be a screen of so many pixels."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def prefer(self, scheme: str) -> None:
        """Prefer `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.send("Emulation.setEmulatedMedia", features=[feature])

    async def picture(self) -> bytes:
        """A PNG of what is on the screen."""
        answer = await self.send("Page.captureScreenshot", format="png", optimizeForSpeed=False)
        return base64.b64decode(answer["data"])


@contextlib.asynccontextmanager
async def tab(browser: str) -> AsyncIterator[Tab]:
    """A new page in a browser, for the time of the `with` block."""
    async with ClientSession() as session:
        async with session.put(f"{browser}/json/new?about:blank") as answer:
            found = await answer.json()
        async with session.ws_connect(found["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            opened = Tab(socket)
            reading = asyncio.create_task(opened.read())
            for domain in ("Page", "Runtime", "Log", "Audits"):
                await opened.send(f"{domain}.enable")
            yield opened
            await socket.close()
            await reading
        async with session.get(f"{browser}/json/close/{found['id']}"):
            pass
