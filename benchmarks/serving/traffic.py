"""Requests to `POST /infer` and what became of each, streamed or not, cancelled or not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import httpx

RETRYABLE: Final = frozenset({
    "queue_full",
    "too_many_waiting",
    "inference_worker_lost",
    "out_of_memory_device",
    "out_of_memory_host",
    "inference_timeout",
    "no_inference_worker",
    "queue_unavailable",
    "storage_unavailable",
})
"""Codes after which a caller may try again; each comes with 429 or 503 and `Retry-After`."""

SHED: Final = frozenset({"queue_full", "too_many_waiting"})


class End(StrEnum):
    """How a request ended."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """With a problem document, before or in a stream."""
    CANCELLED = "cancelled"
    """By ourselves."""
    BROKEN = "broken"
    """Against the contract: what is wrong is in `fault`."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request."""

    messages: list[dict[str, Any]] = field(repr=False)
    adapter: str | None
    """None: the base model."""
    model: str
    max_new_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stream: bool = False
    cancel_after_seconds: float | None = None
    """The caller goes away so long after the request was sent."""
    cancel_after_pieces: int | None = None
    """The caller goes away after so many pieces of a stream."""

    def body(self) -> dict[str, Any]:
        """What is sent."""
        body: dict[str, Any] = {
            "messages": self.messages,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "stream": self.stream,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        target = {"model": self.model} if self.adapter is None else {"adapter": self.adapter}
        return body | target


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request."""

    end: End
    seconds: float
    """Until the end."""
    first_seconds: float | None = None
    """Until the first piece of a stream."""
    status: int | None = None
    code: str | None = None
    output: str | None = None
    completion_tokens: int = 0
    fault: str | None = None

    @property
    def shed(self) -> bool:
        """Whether it was turned away because too many were waiting."""
        return self.code in SHED


class Broken(Exception):
    """An answer that the contract does not know."""


async def ask(client: httpx.AsyncClient, one: Ask) -> Outcome:
    """Send a request and follow it to its end."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(one.cancel_after_seconds):
            return await (_stream(client, one, started) if one.stream else _plain(client, one))
    except TimeoutError:
        return Outcome(end=End.CANCELLED, seconds=time.perf_counter() - started)
    except Broken as broken:
        fault = str(broken)
    except httpx.HTTPError as error:
        fault = f"{type(error).__name__}: {error}"
    return Outcome(end=End.BROKEN, seconds=time.perf_counter() - started, fault=fault)


async def _plain(client: httpx.AsyncClient, one: Ask) -> Outcome:
    started = time.perf_counter()
    response = await client.post("/infer", json=one.body())
    seconds = time.perf_counter() - started
    if response.status_code != 200:
        return _refused(response.status_code, response.headers, response.content, seconds)
    answer = _json(response.content)
    return _answered(answer, seconds=seconds, first_seconds=None)


async def _stream(client: httpx.AsyncClient, one: Ask, started: float) -> Outcome:
    async with client.stream("POST", "/infer", json=one.body()) as response:
        if response.status_code != 200:
            content = await response.aread()
            seconds = time.perf_counter() - started
            return _refused(response.status_code, response.headers, content, seconds)
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise Broken(f"a stream of type {kind!r}")
        pieces: list[str] = []
        first: float | None = None
        async for event, data in _events(response):
            now = time.perf_counter() - started
            if event == "delta":
                pieces.append(data["text"])
                first = first or now
                if one.cancel_after_pieces is not None and len(pieces) >= one.cancel_after_pieces:
                    return Outcome(end=End.CANCELLED, seconds=now, first_seconds=first)
            elif event == "done":
                found = _answered(data, seconds=now, first_seconds=first or now)
                if "".join(pieces) != found.output:
                    raise Broken(f"the pieces {pieces} are not the output {found.output!r}")
                return found
            elif event == "error":
                # A stream has begun: status and headers are sent, the document says what it was.
                return _refusal(data, int(data.get("status", 0)), now, first)
            else:
                raise Broken(f"an unknown event {event!r}")
    raise Broken(f"a stream that ended without its end, after {len(pieces)} pieces")


async def _events(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    event, data = "message", ""
    async for line in response.aiter_lines():
        if line.startswith("event:"):
            event = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data += line.removeprefix("data:").strip()
        elif not line and data:
            yield event, _json(data.encode())
            event, data = "message", ""


def _answered(answer: Mapping[str, Any], *, seconds: float, first_seconds: float | None) -> Outcome:
    if not isinstance(answer.get("output"), str) or "finish_reason" not in answer:
        raise Broken(f"a 200 without an answer: {str(answer)[:200]}")
    return Outcome(
        end=End.ANSWERED,
        seconds=seconds,
        first_seconds=first_seconds,
        status=200,
        output=answer["output"],
        completion_tokens=int(answer["usage"]["completion_tokens"]),
    )


def _refused(status: int, headers: Mapping[str, str], content: bytes, seconds: float) -> Outcome:
    problem = _json(content)
    if status in {429, 503} and "retry-after" not in headers:
        raise Broken(f"{status} {problem.get('code')} without Retry-After")
    return _refusal(problem, status, seconds, None)


def _refusal(
    problem: Mapping[str, Any], status: int, seconds: float, first: float | None
) -> Outcome:
    code = str(problem.get("code"))
    if code not in RETRYABLE:
        raise Broken(f"an undocumented failure {status} {code}: {str(problem)[:300]}")
    return Outcome(end=End.REFUSED, seconds=seconds, first_seconds=first, status=status, code=code)


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        raise Broken(f"no JSON: {content[:200]!r}") from None
    if not isinstance(found, dict):
        raise Broken(f"no object: {content[:200]!r}")
    return found
