"""What keeps a service up among strangers: the size of a request, API keys, requests per second of a client.

Written against ASGI, so that a request is refused before anything reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from starlette._utils import get_route_path  # the path that the router looks at: another reading would be a way around

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENTS = 10_000  # whose rate is remembered
# For whoever watches over the service, and what a browser loads before it can send a key. All else is guarded.
OPEN = ("/v1/health", "/v1/ready", "/metrics", "/", "/openapi.json")
FILES = "/page/"
CHEAP = "/poster"  # a page of posters is one visit, not a hundred
CHARGE = "m5.charge"  # in a guarded request's scope: takes so many more tokens of its client


class ApiKeys:
    """Whether a request brings one of the keys; the time it takes tells nothing about them.

    Args:
        keys: accepted ones; none: everybody may ask.
    """

    def __init__(self, keys: list[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def wanted(self) -> bool:
        """Whether there are any."""
        return bool(self._digests)

    def accepts(self, given: bytes) -> bool:
        """Digests of one length are compared, and all of them."""
        digest = hashlib.sha256(given).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return not self._digests or any(matches)


class RateLimit:
    """A bucket of tokens per client.

    Args:
        per_second: tokens that flow in; None: no limit.
        burst: tokens that a bucket holds.
    """

    def __init__(self, per_second: float | None, burst: int, clock: Callable[[], float] = time.monotonic):
        self.per_second, self.burst, self.clock = per_second, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """0, and a token is taken; or the seconds until there is one."""
        if self.per_second is None:
            return 0.0
        now = self.clock()
        tokens, seen = self._buckets.pop(client, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - seen) * self.per_second)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self.per_second

    def charge(self, client: str, tokens: int) -> None:
        """Take more tokens of a client who was let in, more even than there are: the bucket then owes them."""
        if client in self._buckets:
            left, seen = self._buckets[client]
            self._buckets[client] = left - tokens, seen


class Limits:
    """ASGI middleware that answers 401, 413 and 429 by itself.

    Args:
        app: what it guards.
        keys: of `Authorization: Bearer KEY` or `X-API-Key: KEY`, asked for on all paths but `OPEN` and `FILES`.
        rate: by key, or by address where no key is asked for; for the same paths but posters. What a request costs
            beyond one token is known once it is read: the app takes it by the scope's `CHARGE`.
        largest: bytes of a body.
    """

    def __init__(self, app: App, *, keys: ApiKeys, rate: RateLimit, largest: int):
        self.app, self.keys, self.rate, self.largest = app, keys, rate, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path = get_route_path(scope)
        if path not in OPEN and not path.startswith(FILES):
            key = headers.get(b"x-api-key", headers.get(b"authorization", b"").removeprefix(b"Bearer "))
            if not self.keys.accepts(key):
                await refuse(send, 401, "an API key is needed", {"WWW-Authenticate": "Bearer"})
                return
            # A header that nobody checks names nobody: it could be another one each time.
            address = (scope.get("client") or ("?",))[0]
            client = hashlib.sha256(key).hexdigest() if self.keys.wanted else address
            if not path.endswith(CHEAP) and (wait := self.rate.wait(client)):
                await refuse(send, 429, "too many requests", {"Retry-After": str(int(wait) + 1)})
                return
            scope[CHARGE] = partial(self.rate.charge, client)
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 15 or int(declared) > self.largest:
            await refuse(send, 413, f"a request may hold at most {self.largest} bytes")
            return
        await self._bounded(scope, receive, send)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app, for whom a body without a true length ends where it becomes too large."""
        read = 0

        async def bounded_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.largest:
                raise _TooLarge
            return message

        async def withheld_send(message: Message) -> None:
            if read <= self.largest:  # what the app makes of a body that ended early is no answer
                await send(message)

        with contextlib.suppress(_TooLarge):
            await self.app(scope, bounded_receive, withheld_send)
        if read > self.largest:
            await refuse(send, 413, f"a request may hold at most {self.largest} bytes")


class _TooLarge(Exception):
    pass


async def refuse(send: Send, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
    """A JSON answer of one sentence."""
    body = json.dumps({"detail": detail}).encode()
    given = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    raw = [(name.lower().encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
