"""One HTTP connection to the service: retries that cannot do harm, and errors with a shape.

A request is sent again when it cannot have been heard (the connection was refused), or when hearing
it twice changes nothing (reading, the idempotent verbs, a creation with an `Idempotency-Key`) and
the service asked for patience (429, 503) or fell silent. What comes out of every function here is
an answer, `ServiceUnreachable`, or `RequestRefused`.
"""

import json as json_module
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from grit_client.errors import (
    InvalidInput,
    Problem,
    ServiceUnavailable,
    ServiceUnreachable,
    describe_network_error,
    refusal,
)

CONNECT_SECONDS = 5.0
_PATIENCE = (429, 502, 503, 504)
_PLACES = ("/v1", "/docs", "/jobs", "/healthz", "/openapi.json")
"""Paths that people copy together with the address of a service."""
_HEARD = "inference_timeout"  # the one 503 that may still be worked on


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and how long to try again."""

    attempts: int = 4
    """Sends of one request, the first included."""
    first_seconds: float = 0.25
    """Wait before the second send; doubled for every further one, with jitter."""
    longest_seconds: float = 10.0
    """Longest wait that is accepted, also when the service asks for more with Retry-After."""


class Connection:
    """Sends requests to one service with one key.

    Args:
        base_url: Such as `http://127.0.0.1:8000`.
        api_key: `grit_<prefix>_<secret>`; None sends none.
        transport: Another httpx transport, for tests and for proxies.
        timeout_seconds: Longest silence of the service while it answers.
        retries: How often to try again.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        timeout_seconds: float = 60.0,
        retries: Retries | None = None,
    ) -> None:
        headers = {"Accept": "application/json", "User-Agent": "grit-client"}
        if api_key:
            headers["Authorization"] = f"Bearer {_header_value(api_key)}"
        self.base_url = _checked_url(base_url)
        self.timeout_seconds = timeout_seconds
        self.retries = retries or Retries()
        try:
            self._http = httpx.Client(
                base_url=self.base_url,
                headers=headers,
                transport=transport,
                timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            )
        except httpx.InvalidURL as error:
            raise InvalidInput(f"{base_url!r} is not a URL ({error}).") from None

    def close(self) -> None:
        """Close the sockets."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        idempotent: bool | None = None,
        silence_seconds: float | None = None,
        **content: Any,
    ) -> httpx.Response:
        """Send a request until it is answered, and return the answer when it is not an error.

        Args:
            method: The HTTP method.
            path: From the root, with a leading slash.
            idempotent: Whether hearing it twice changes nothing; by default, whether it is no POST.
            silence_seconds: Longest silence, where it is not the connection's.
            **content: httpx's `json`, `params`, `headers`; `body`, a function that returns httpx
                arguments anew for each send; `retries`, where they are not the connection's.
        """
        repeatable = method != "POST" if idempotent is None else idempotent
        retries = content.pop("retries", self.retries)
        started = content.pop("body", None)
        if "json" in content:
            content["content"] = encode(content.pop("json"))
            content["headers"] = {"Content-Type": "application/json", **content.get("headers", {})}
        if silence_seconds is not None:
            content["timeout"] = httpx.Timeout(silence_seconds, connect=CONNECT_SECONDS)

        def send() -> httpx.Response:
            arguments = content if started is None else {**content, **started()}
            return checked(self._http.request(method, path, **arguments))

        return self._until_answered(send, repeatable=repeatable, retries=retries)

    def json(self, method: str, path: str, **content: Any) -> Any:
        """Send a request and return the JSON of its answer."""
        return self.decoded(self.request(method, path, **content))

    def decoded(self, response: httpx.Response) -> Any:
        """Return an answer's JSON.

        Raises:
            ServiceUnreachable: What answered is no GRIT service.
        """
        try:
            return response.json()
        except ValueError:
            raise ServiceUnreachable(
                f"{self.base_url} answered {response.request.method} {response.request.url.path}"
                " with something that is not JSON; is this the address of a GRIT service?"
            ) from None

    @contextmanager
    def stream(
        self, method: str, path: str, *, silence_seconds: float | None = None, **content: Any
    ) -> Iterator[httpx.Response]:
        """Send a request once and read the answer piece by piece."""
        silence = self.timeout_seconds if silence_seconds is None else silence_seconds
        timeout = httpx.Timeout(silence, connect=CONNECT_SECONDS)
        try:
            with self._http.stream(method, path, timeout=timeout, **content) as response:
                if response.is_error:
                    response.read()
                yield checked(response)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    @contextmanager
    def asked(
        self, path: str, *, json: Any, accept: str, silence_seconds: float
    ) -> Iterator[httpx.Response]:
        """POST until it is answered, as `request` does, and read the answer piece by piece.

        Args:
            path: From the root, with a leading slash.
            json: The body.
            accept: Media type of the answer.
            silence_seconds: Longest silence, also between pieces.
        """
        content = encode(json)
        headers = {"Content-Type": "application/json", "Accept": accept}
        timeout = httpx.Timeout(silence_seconds, connect=CONNECT_SECONDS)

        def send() -> httpx.Response:
            request = self._http.build_request(
                "POST", path, content=content, headers=headers, timeout=timeout
            )
            response = self._http.send(request, stream=True)
            if response.is_error:
                response.read()
            return checked(response)

        response = self._until_answered(send, repeatable=False, retries=self.retries)
        try:
            yield response
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        finally:
            response.close()

    def _until_answered(
        self, send: Callable[[], httpx.Response], *, repeatable: bool, retries: Retries
    ) -> httpx.Response:
        attempt = 0
        while True:
            attempt += 1
            last = attempt >= retries.attempts
            try:
                return send()
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                # Never heard: safe to repeat, whatever it is.
                if last:
                    raise self._unreachable(error) from error
                pause = self._pause(attempt)
            except httpx.HTTPError as error:
                if last or not repeatable:
                    raise self._unreachable(error) from error
                pause = self._pause(attempt)
            except ServiceUnavailable as error:
                asked = self._pause_asked(error.problem, attempt)
                if last or asked is None or not (repeatable or _did_nothing(error.problem)):
                    raise
                pause = asked
            time.sleep(pause)

    def _pause(self, attempt: int) -> float:
        ceiling = self.retries.first_seconds * 2 ** (attempt - 1)
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 - spreads clients, keeps no secret
        return min(self.retries.longest_seconds, float(ceiling * jitter))

    def _pause_asked(self, problem: Problem, attempt: int) -> float | None:
        # None: not a matter of patience, or of more patience than we have.
        if problem.status not in _PATIENCE:
            return None
        asked = problem.document.get("retry_after_seconds")
        pause = float(asked) if isinstance(asked, int | float) else self._pause(attempt)
        return pause if pause <= self.retries.longest_seconds else None

    def _unreachable(self, error: httpx.HTTPError) -> ServiceUnreachable:
        fix = "Start the service with `grit up`, or name another with --url or GRIT_URL."
        if isinstance(error, httpx.ConnectError) and "SSL" in str(error):
            if "CERTIFICATE" not in str(error):
                plain = f"http://{self.base_url.partition('://')[2]}"
                return ServiceUnreachable(f"{self.base_url} does not speak TLS. Is it {plain}?")
            reason = f"The certificate of {self.base_url} is not trusted"
            fix = "Correct it, or name its authority in SSL_CERT_FILE."
        elif isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            reason = f"No service answers at {self.base_url}"
        elif isinstance(error, httpx.TimeoutException):
            reason = f"{self.base_url} did not answer in time"
        elif isinstance(error, httpx.LocalProtocolError):
            reason = f"{self.base_url} cannot be asked"
        elif isinstance(error, httpx.RemoteProtocolError) and "illegal" in str(error):
            reason = f"{self.base_url} answered with something that is not HTTP"
            if self.base_url.startswith("http://"):
                fix = f"Is it https://{self.base_url.partition('://')[2]}?"
        else:
            reason = f"The connection to {self.base_url} broke off"
        return ServiceUnreachable(f"{reason} ({describe_network_error(error)}). {fix}")


def _did_nothing(problem: Problem) -> bool:
    # Then anything may be sent again, a POST included.
    return problem.status in {429, 503} and problem.code != _HEARD


def _checked_url(text: str) -> str:
    """Return the address of a service without its last slash.

    Raises:
        InvalidInput: If it is no address of a service; the message has the one that was meant.
    """
    url = text.strip().rstrip("/")
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise InvalidInput(f"The address {text!r} has no scheme; write http://{url}.")
    if scheme.lower() not in {"http", "https"}:
        raise InvalidInput(
            f"The address {text!r} begins with {scheme}://; write http://{rest} or https://{rest}."
        )
    place = next((place for place in _PLACES if url.endswith(place)), None)
    if place is not None:
        raise InvalidInput(
            f"The address {text!r} ends with {place}, which is a place in the service; write"
            f" {url.removesuffix(place)}."
        )
    return url


def encode(value: Any) -> bytes:
    """Encode a request body.

    Raises:
        InvalidInput: If it holds a number that JSON has no word for, or no JSON value at all.
    """
    try:
        return json_module.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"The request cannot be written as JSON: {error}. Numbers must be finite."
        ) from None


def checked(response: httpx.Response) -> httpx.Response:
    """Return an answer that is not an error.

    Raises:
        refusal: The error of the answer's status, a `RequestRefused`.
    """
    if not response.is_error:
        return response
    try:
        document = response.json()
    except ValueError:
        document = {"detail": _sentence(response)}
    if not isinstance(document, dict):
        document = {"detail": _sentence(response)}
    if response.status_code == 404 and "code" not in document:
        url = response.request.url
        detail = f"{url.copy_with(query=None)} is no place of a GRIT service; is its address right?"
        document = {"detail": detail}
    asked = _retry_after(response.headers)
    if asked is not None:
        document["retry_after_seconds"] = asked
    raise refusal(Problem.from_document(response.status_code, document))


def _sentence(response: httpx.Response) -> str:
    text = " ".join(response.text.split())[:200]
    return f"HTTP {response.status_code} {response.reason_phrase}: {text or 'no details'}"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _header_value(key: str) -> str:
    text = key.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidInput("The API key holds characters that no key has; copy it again.")
    return text
