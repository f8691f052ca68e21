"""What the service knows about itself: presets, devices, keys, health."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from grit_client.answers import ApiKey
from grit_client.calls.resource import Calls, path_of
from grit_client.connection import Retries
from grit_client.errors import ServiceUnavailable


class ServiceCalls(Calls):
    """Presets, devices, keys, health."""

    def presets(self) -> list[dict[str, Any]]:
        """`GET /presets`."""
        return list(self._pages("/presets", {}))

    def preset(self, name: str) -> dict[str, Any]:
        """`GET /presets/{name}`: its configuration in full."""
        return self._dict("GET", path_of("presets", name))

    def devices(self) -> list[dict[str, Any]]:
        """`GET /devices`: the devices that workers of this deployment serve."""
        return list(self._pages("/devices", {}))

    def job_schema(self) -> dict[str, Any]:
        """`GET /schema/job`: the JSON schema of a job."""
        return self._dict("GET", "/schema/job")

    def create_key(self, name: str, *, scopes: Sequence[str], team: str | None = None) -> ApiKey:
        """`POST /keys`: the answer holds the key's secret text, this once."""
        body = {"name": name, "scopes": list(scopes)} | ({"team": team} if team else {})
        return cast("ApiKey", self._connection.json("POST", "/keys", json=body))

    def list_keys(self) -> Iterator[ApiKey]:
        """`GET /keys`."""
        return cast("Iterator[ApiKey]", self._pages("/keys", {}))

    def revoke_key(self, key: str) -> None:
        """`DELETE /keys/{id}`: the key is refused from now on."""
        self._connection.request("DELETE", path_of("keys", key))

    def health(self) -> dict[str, Any]:
        """`GET /readyz`: each part and whether it works; an answer also when not all do."""
        once = Retries(attempts=1)
        try:
            return self._dict("GET", "/readyz", retries=once)
        except ServiceUnavailable as error:
            return {"status": "unavailable", **error.problem.document}

    def version(self) -> dict[str, Any]:
        """`GET /version`."""
        return self._dict("GET", "/version")

    def _dict(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        return cast("dict[str, Any]", self._connection.json(method, path, **content))
