"""`GritClient`: every call of the service, as a method.

    client = GritClient()  # the embedded service of this folder: .grit/url and .grit/key
    job = client.create_job({"model": "digits-vlm", "dataset": "ds_...", "preset": "smolvlm_fast"})
    client.wait_for(job["id"])
    client.infer("Which digit is this?", images=["digit.png"], job=job["id"])["output"]

A configuration that trains on a laptop moves to the service by one line: `config=` takes the
library's `ModelGRITConfig` itself. Answers are the JSON of the HTTP contract (see `answers`);
what goes wrong is an error of `errors`.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from grit_client.calls.adapters import AdapterCalls
from grit_client.calls.datasets import DatasetCalls
from grit_client.calls.inference import InferenceCalls
from grit_client.calls.jobs import JobCalls
from grit_client.calls.models import ModelCalls
from grit_client.calls.service import ServiceCalls
from grit_client.connection import Connection, Retries
from grit_client.home import DEFAULT_URL, Home


class GritClient(JobCalls, DatasetCalls, ModelCalls, AdapterCalls, InferenceCalls, ServiceCalls):
    """A service, seen from Python.

    Args:
        base_url: Such as `http://127.0.0.1:8000`; by default the embedded service of `home`.
        api_key: By default the key of the embedded service of `home`, for its own address alone.
        home: Folder of the embedded service; `.grit` by default.
        transport: Another httpx transport, for tests and for proxies.
        timeout: Longest silence of the service while it answers, in seconds.
        retries: How often to try again what can be tried again.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        home: str | Path | None = None,
        transport: httpx.BaseTransport | None = None,
        timeout: float = 60.0,
        retries: Retries | None = None,
    ) -> None:
        folder = Home.at(home)
        is_named = base_url is not None and api_key is not None  # the home says nothing more
        own_url = (None if is_named else folder.read_url()) or DEFAULT_URL
        url = base_url or own_url
        # The key of the embedded service is sent to the embedded service and to nobody else.
        if api_key is None and url.rstrip("/") == own_url.rstrip("/"):
            api_key = folder.read_key()
        self._connection = Connection(
            url, api_key, transport=transport, timeout_seconds=timeout, retries=retries
        )

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._connection.base_url

    def close(self) -> None:
        """Close the sockets."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
