"""What the service knows about itself: presets, devices, keys, teams, health."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from grit_client.answers import ApiKey, Team
from grit_client.calls.resource import Calls, path_of
from grit_client.connection import Retries
from grit_client.errors import ServiceUnavailable


class ServiceCalls(Calls):
    """Presets, devices, keys, teams, health."""

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

    def create_key(
        self,
        name: str,
        *,
        scopes: Sequence[str],
        team: str | None = None,
        expires_in_days: float | None = None,
    ) -> ApiKey:
        """`POST /keys`: the answer holds the key's secret text, this once."""
        given = {"team": team or None, "expires_in_days": expires_in_days}
        body = {"name": name, "scopes": list(scopes), **_told(given)}
        return cast("ApiKey", self._connection.json("POST", "/keys", json=body))

    def rotate_key(
        self,
        key: str,
        *,
        overlap_seconds: int | None = None,
        expires_in_days: float | None = None,
    ) -> ApiKey:
        """`POST /keys/{id}/rotate`: a key in its place; the answer holds its text, this once.

        Args:
            key: Whose place it takes.
            overlap_seconds: The old key goes on for so long; none: the service's default, a day.
            expires_in_days: When the new key ends; none: it lives as long as the old one was to.
        """
        body = _told({"overlap_seconds": overlap_seconds, "expires_in_days": expires_in_days})
        path = path_of("keys", key, "rotate")
        return cast("ApiKey", self._connection.json("POST", path, json=body))

    def list_keys(self) -> Iterator[ApiKey]:
        """`GET /keys`."""
        return cast("Iterator[ApiKey]", self._pages("/keys", {}))

    def revoke_key(self, key: str) -> None:
        """`DELETE /keys/{id}`: the key is refused from now on."""
        self._connection.request("DELETE", path_of("keys", key))

    def own_team(self) -> Team:
        """`GET /team`: your team's limits, and how much of them it uses."""
        return cast("Team", self._connection.json("GET", "/team"))

    def list_teams(self) -> Iterator[Team]:
        """`GET /teams`; for administrators."""
        return cast("Iterator[Team]", self._pages("/teams", {}))

    def get_team(self, name: str) -> Team:
        """`GET /teams/{name}`; for administrators."""
        return cast("Team", self._connection.json("GET", path_of("teams", name)))

    def set_team(self, name: str, limits: Mapping[str, int | None]) -> Team:
        """`PATCH /teams/{name}`: what is left out stays; none is the deployment's limit again."""
        path = path_of("teams", name)
        return cast("Team", self._connection.json("PATCH", path, json=dict(limits)))

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


def _told(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
