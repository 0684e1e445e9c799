"""A page in headless Chromium, driven by the DevTools protocol: https://chromedevtools.github.io/devtools-protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=900,820")


class Page:
    """One page. `requested` has the address of everything that it asked for."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self.requested: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads(await self._socket.receive_str(timeout=60))
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message}"
                return message["result"]

    async def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def wait_for(self, expression: str, *, seconds: float = 0) -> None:
        """Wait until an expression is true, and has been for some seconds; a minute at most."""
        since = None
        for _ in range(300):
            now = asyncio.get_running_loop().time()
            since = (since or now) if await self.value(expression) else None
            if since is not None and now - since >= seconds:
                return
            await asyncio.sleep(0.2)
        text = await self.value("document.body.innerText")
        raise AssertionError(f"{expression} never came true; the page says: {text}")

    async def upload(self, selector: str, file: Path) -> None:
        """Choose a file in an input of a form."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        found = await self.call("DOM.querySelector", nodeId=root, selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(file)])

    async def type(self, selector: str, text: str) -> None:
        """Type a text into a field, and Enter."""
        await self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    async def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def chromium(address: str) -> AsyncIterator[Page]:
    """Headless Chromium at an address."""
    import aiohttp

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
        )
        try:
            file = Path(profile) / "DevToolsActivePort"
            for _ in range(300):
                if file.exists() and file.read_text().count("\n"):
                    break
                await asyncio.sleep(0.2)
            port = file.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    found = next(each for each in await answer.json() if each["type"] == "page")
                async with session.ws_connect(found["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Network", "Page", "DOM"):
                        await page.call(f"{domain}.enable")
                    await page.call("Page.navigate", url=address)
                    yield page
        finally:
            process.terminate()
            process.wait(60)
