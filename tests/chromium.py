"""A headless Chromium that opens one page at a time and tells what it sees, asked over its own debugging protocol."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
REASON = "no Chromium is installed here (apt-get install chromium)"


@dataclass
class Page:
    """A page that is open. requests: every URL that was asked for; complaints: errors and warnings of the console."""

    socket: aiohttp.ClientWebSocketResponse
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    loaded: bool = False
    _number: int = 0

    async def ask(self, method: str, **given: Any) -> Any:
        """The answer of the browser; what it tells meanwhile is kept."""
        self._number += 1
        await self.socket.send_json({"id": self._number, "method": method, "params": given})
        while True:
            told = await self.told()
            if told.get("id") == self._number:
                assert "error" not in told, told
                return told["result"]

    async def told(self) -> dict[str, Any]:
        """The next message."""
        told: dict[str, Any] = json.loads((await self.socket.receive(timeout=60)).data)
        given = told.get("params", {})
        match told.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(given["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(given)[:500])
            case "Page.loadEventFired":
                self.loaded = True
        return told

    async def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        told = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def open(self, url: str) -> None:
        """Load a page and wait for it."""
        for domain in ("Network", "Log", "Runtime", "Page"):
            await self.ask(f"{domain}.enable")
        self.loaded = False
        await self.ask("Page.navigate", url=url)
        while not self.loaded:
            await self.told()

    async def size(self, width: int) -> None:
        """A screen of this width."""
        given = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.ask("Emulation.setDeviceMetricsOverride", **given)

    async def media(self, kind: str, scheme: str) -> None:
        """screen or print, light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.ask("Emulation.setEmulatedMedia", media=kind, features=features)


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """A browser that ends with its page."""
    assert CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [CHROMIUM, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr
    try:
        port = 0
        for line in process.stderr:
            if "DevTools listening on" in line:
                port = int(line.split("127.0.0.1:")[1].split("/")[0])
                break
        assert port, "Chromium ended before it listened"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (target,) = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                yield Page(socket)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)
        process.stderr.close()
