"""A reverse proxy that injects faults between an S3 client and its server.

    python -m chaos.faultproxy PORT UPSTREAM [CONTROL_PORT]         in tests/

POST /__faults {"rules": [...], "seed": 0} sets rules (the fields of `Rule`) and starts the counts at zero; GET answers
{"hits": {action: count}}. The first rule that applies to a request decides about it; a request without one is forwarded
as it is. Where the upstream is down or hangs up, the client's connection is reset.

    503, 500, 403   answer SlowDown, InternalError, AccessDenied; nothing is forwarded
    reset           reset the connection (RST); nothing is forwarded
    lost            forward, then reset the connection: what was asked for has happened
    slow            forward after `delay` seconds, also where the client has given up by then
    truncate        of a GET's answer send the headers and half of the body, then reset the connection
    stall           never answer; nothing is forwarded
    outage          reset every open connection and refuse new ones for `delay` seconds

During an outage only the control port answers /__faults; `FaultProxy` uses that one throughout.
"""

import asyncio
import json
import random
import re
import socket
import struct
import sys
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from chaos.servers import HOST, Server, free_port

CONTROL = "/__faults"
ERRORS = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied"}
ACTIONS = (*ERRORS, "reset", "lost", "slow", "truncate", "stall", "outage")
# Headers of one connection, not of the message. Without Expect the upstream answers once, to the whole body.
OF_A_CONNECTION = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect"}


@dataclass
class Rule:
    """What to do to requests whose method is and whose path?query contains a match, `times` times (None: always).

    The draw for `probability` depends on the seed, the request and how often it has come, not on other requests, so it
    is the same whatever order concurrent ones arrive in.
    """

    action: str
    method: str = ".*"
    match: str = ""
    times: int | None = None
    probability: float = 1.0
    delay: float = 0.0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"no such action: {self.action}")

    def applies(self, method: str, target: str, draw: float) -> bool:
        return (
            (self.times is None or self.times > 0)
            and (self.action != "truncate" or method == "GET")
            and re.fullmatch(self.method, method) is not None
            and re.search(self.match, target) is not None
            and draw < self.probability
        )


class Proxy:
    """The server's side: rules, counts and the two ports."""

    def __init__(self, port: int, upstream: str, control_port: int | None) -> None:
        self.port = port
        self.upstream = upstream.rstrip("/")
        self.control_port = control_port
        self.rules: list[Rule] = []
        self.seed = 0
        self.hits: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    async def serve(self) -> None:
        # force_close: on a kept connection the client would repeat a request that the upstream hung up on.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        added = ["User-Agent", "Content-Type", "Accept", "Accept-Encoding"]
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, skip_auto_headers=added
        ) as self.session:
            app = web.Application(client_max_size=1 << 31)
            app.router.add_route("*", CONTROL, self.control)
            app.router.add_route("*", "/{path:.*}", self.handle)
            self.runner = web.AppRunner(app, access_log=None)
            await self.runner.setup()
            await self.listen()
            if self.control_port is not None:
                await web.TCPSite(self.runner, HOST, self.control_port).start()
            await asyncio.Event().wait()

    async def listen(self) -> None:
        self.site = web.TCPSite(self.runner, HOST, self.port, backlog=1024)
        await self.site.start()

    async def control(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            given = await request.json()
            self.rules = [Rule(**rule) for rule in given["rules"]]
            self.seed = given.get("seed", 0)
            self.hits.clear()
            self.seen.clear()
        return web.json_response({"hits": self.hits})

    def rule_for(self, method: str, target: str) -> Rule | None:
        self.seen[f"{method} {target}"] += 1
        for number, rule in enumerate(self.rules):
            request = f"{self.seed} {number} {method} {target} {self.seen[f'{method} {target}']}"
            if rule.applies(method, target, random.Random(request).random()):
                if rule.times is not None:
                    rule.times -= 1
                self.hits[rule.action] += 1
                return rule
        return None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        # Read before any fault: a client that cannot send its whole body reports that instead of the fault.
        body = await request.read()
        if request.transport is None or request.transport.is_closing():  # an outage has begun
            return web.Response()
        rule = self.rule_for(request.method, request.raw_path)
        action = rule.action if rule else ""
        if rule and action == "outage":
            return await self.outage(request, rule.delay)
        if rule:
            await asyncio.sleep(rule.delay)
        if action in ERRORS:
            text = f"<Error><Code>{ERRORS[action]}</Code><Message>injected</Message></Error>"
            return web.Response(status=int(action), content_type="application/xml", text=text)
        if action == "stall":
            await asyncio.Event().wait()
        if action == "reset":
            return self.reset(request)
        try:
            return await self.forward(request, body, action)
        except aiohttp.ClientError:
            return self.reset(request)

    async def forward(self, request: web.Request, body: bytes, action: str) -> web.StreamResponse:
        """Host stays as it came, for the signature covers it."""
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in OF_A_CONNECTION]
        url = URL(self.upstream + request.raw_path, encoded=True)
        data = body if body or request.method in ("PUT", "POST") else None
        async with self.session.request(
            request.method, url, headers=headers, data=data, allow_redirects=False
        ) as upstream:
            content = await upstream.read()
        if action == "lost":
            return self.reset(request)
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        for name, value in upstream.headers.items():
            if name.lower() not in OF_A_CONNECTION:
                response.headers.add(name, value)
        # A HEAD's Content-Length is the object's; a chunked answer has none, and this one is not chunked.
        if request.method != "HEAD" and upstream.status not in (204, 304):
            response.content_length = len(content)
        try:
            await response.prepare(request)
            if action == "truncate":
                await response.write(content[: len(content) // 2])
                await asyncio.sleep(0.05)  # a reset takes back what the client's side has not received yet
                return self.reset(request, response)
            if content:
                await response.write(content)
        except ConnectionError:
            return self.reset(request, response)
        return response

    def reset(self, request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
        if request.transport is not None:
            abort(request.transport)
        return response or web.Response()

    async def outage(self, request: web.Request, seconds: float) -> web.StreamResponse:
        await self.site.stop()
        assert self.runner.server is not None
        for connection in self.runner.server.connections:
            transport = connection.transport
            if transport is not None and transport.get_extra_info("sockname")[1] == self.port:
                abort(transport)
        await asyncio.sleep(seconds)
        await self.listen()
        return web.Response()


def abort(transport: asyncio.Transport | asyncio.BaseTransport) -> None:
    """Close with RST: that is what a close means on a socket that may linger for no time."""
    assert isinstance(transport, asyncio.Transport)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class FaultProxy(Server):
    """The proxy in a process of its own, inside a `with`; its `url` and `environment` replace the server's."""

    name = "faultproxy"
    ready = CONTROL

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.upstream = upstream
        self.control_port = free_port()

    def gateway(self) -> list[str]:
        return [sys.executable, "-m", "chaos.faultproxy", str(self.port), self.upstream, str(self.control_port)]

    def set(self, *rules: Rule, seed: int = 0) -> None:
        """These rules from now on, none without; `hits` starts at zero."""
        self.control({"rules": [asdict(rule) for rule in rules], "seed": seed})

    def hits(self) -> dict[str, int]:
        """How often each action has been taken since `set`."""
        hits: dict[str, int] = self.control()["hits"]
        return hits

    def control(self, given: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if given is None else json.dumps(given).encode()
        with urllib.request.urlopen(f"http://{HOST}:{self.control_port}{CONTROL}", data, timeout=10) as answer:
            answered: dict[str, Any] = json.load(answer)
            return answered


if __name__ == "__main__":
    asyncio.run(Proxy(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else None).serve())
