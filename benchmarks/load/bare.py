"""The peers: what a careful hand would write for one purpose, on bare ASGI.

    python -m benchmarks.load.bare --port 8001

No authentication, no validation, no log, no request ids: one prepared statement on a pool of
autocommitting connections, and `json`. It runs under uvicorn with the same options as the API.

- `GET /plain`: the same bytes again and again, no database.
- `GET /jobs/{id}`: the columns that the API's answer needs, selected by id, as JSON.
- `POST /jobs`: one INSERT with the same columns, and one LPUSH.
"""

import argparse
import asyncio
import json
import os
from typing import Any, Final

import psycopg
import uvicorn
from psycopg.types.json import Jsonb
from redis.asyncio import Redis
from sqlalchemy import make_url

from benchmarks.load.rows import MODELS, NUM_DATASET_ROWS, inventory, job_body
from grit_core.config.presets import describe_preset
from grit_core.job_spec import resolve_job
from store.ids import new_id

PRESET: Final = "smolvlm_fast"
_HEADERS: Final = [(b"content-type", b"application/json")]
_READ: Final = (
    "id", "kind", "status", "phase", "status_reason", "model", "dataset_id", "eval_dataset_id",
    "retention_dataset_id", "source_adapter_id", "preset", "config", "training", "device",
    "device_reason", "name", "metadata", "priority", "team", "attempt", "max_attempts",
    "created_at", "started_at", "finished_at", "progress", "queue", "plan_hash", "result", "error",
)  # fmt: skip
_SELECT: Final = (
    f"SELECT {', '.join(_READ)}, jsonb_array_length(plan->'layers'),"
    " plan->'trainable_parameters' FROM jobs WHERE id = %s"
)
_WRITTEN: Final = (
    "id", "team", "status", "kind", "name", "metadata", "model", "dataset_id", "request", "config",
    "training", "plan", "plan_hash", "device", "queue", "priority", "attempt", "charged_attempts",
    "max_attempts", "infra_failures", "last_sequence", "version",
)  # fmt: skip
_INSERT: Final = (
    f"INSERT INTO jobs ({', '.join(_WRITTEN)}, created_at, queued_at, updated_at)"
    f" VALUES ({', '.join(['%s'] * len(_WRITTEN))}, now(), now(), now())"
    " RETURNING created_at"
)


class Bare:
    """The app; its connections are made with the first request that needs them."""

    def __init__(self) -> None:
        self._free: asyncio.Queue[psycopg.AsyncConnection[Any]] = asyncio.Queue()
        self._opening: asyncio.Task[None] | None = None
        self._plain = json.dumps(describe_preset(PRESET), separators=(",", ":")).encode()
        self._broker: Any = Redis.from_url(os.environ["BARE_BROKER_URL"])
        resolved = resolve_job(
            job_body(MODELS[0], "ds"), inventory(), num_rows=NUM_DATASET_ROWS, device="cpu"
        )
        assert resolved is not None
        self._plan_hash = resolved.plan.plan_hash
        self._resolved = {
            "config": resolved.config_json(),
            "training": resolved.training_json(),
            "plan": resolved.plan.to_json(),
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        if scope["path"] == "/plain":
            body = self._plain
        elif scope["method"] == "GET":
            body = await self._read(scope["path"].rpartition("/")[2])
        else:
            body = await self._create((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": body})

    async def _read(self, job_id: str) -> bytes:
        connection = await self._connection()
        try:
            row = await (await connection.execute(_SELECT, [job_id], prepare=True)).fetchone()
        finally:
            self._free.put_nowait(connection)
        assert row is not None
        found = dict(zip((*_READ, "layers", "trainable_parameters"), row, strict=True))
        found["links"] = {name: f"/jobs/{job_id}/{name}" for name in ("events", "metrics")}
        return json.dumps(found, default=str).encode()

    async def _create(self, data: bytes) -> bytes:
        body = json.loads(data)
        job_id = new_id("job")
        texts = {name: Jsonb(value) for name, value in self._resolved.items()}
        values = (
            job_id, "team-0", "queued", "training", body["name"], Jsonb(body["metadata"]),
            body["model"], body["dataset"], Jsonb(body), texts["config"], texts["training"],
            texts["plan"], self._plan_hash, "cpu", "cpu", 0, 0, 0, 3, 0, 1, 1,
        )  # fmt: skip
        connection = await self._connection()
        try:
            row = await (await connection.execute(_INSERT, values, prepare=True)).fetchone()
        finally:
            self._free.put_nowait(connection)
        assert row is not None
        await self._broker.lpush("bare", json.dumps({"task": "grit.claim", "queue": "cpu"}))
        found = {"id": job_id, "created_at": row[0], "status": "queued", **body, **self._resolved}
        del found["plan"]
        return json.dumps(found, default=str).encode()

    async def _connection(self) -> psycopg.AsyncConnection[Any]:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        if not self._opening.done():
            await self._opening
        return await self._free.get()

    async def _open(self) -> None:
        url = make_url(os.environ["BARE_DATABASE_URL"]).set(drivername="postgresql")
        for _ in range(int(os.environ["BARE_POOL_SIZE"])):
            address = url.render_as_string(hide_password=False)
            connection = await psycopg.AsyncConnection.connect(address, autocommit=True)
            self._free.put_nowait(connection)


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    uvicorn.run(Bare(), port=port, access_log=False, server_header=False, log_level="warning")


if __name__ == "__main__":
    main()
