"""Base models that jobs may name."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from grit_client.answers import BaseModel
from grit_client.calls.resource import Calls, path_of
from grit_client.errors import InvalidInput


class ModelCalls(Calls):
    """Calls under `/models`."""

    def list_models(self) -> Iterator[BaseModel]:
        """`GET /models`."""
        return cast("Iterator[BaseModel]", self._pages("/models", {}))

    def get_model(self, model: str) -> BaseModel:
        """`GET /models/{id}`."""
        return cast("BaseModel", self._connection.json("GET", path_of("models", model)))

    def register_model(
        self,
        source: str | Path,
        *,
        id: str | None = None,  # noqa: A002 - the field's name on the wire
        wait_seconds: float | None = 120.0,
    ) -> BaseModel:
        """`POST /models`: make a base model known, and wait until it has been probed.

        Args:
            source: A Hugging Face folder or hub id, as the service sees it.
            id: What jobs will write in `model`; by default the folder's name or the hub id.
            wait_seconds: How long to wait until it is ready; None does not wait.

        Raises:
            InvalidInput: The model cannot be trained; the message says why.
            TimeoutError: It is not ready in time.
        """
        local = Path(source).expanduser()
        if local.is_dir():
            source, default = str(local.absolute()), local.absolute().name
        else:
            source = default = str(source)
        body = {"id": id or default, "source": source}
        model = cast(
            "BaseModel", self._connection.json("POST", "/models", json=body, idempotent=True)
        )
        if wait_seconds is None:
            return model
        deadline = time.monotonic() + wait_seconds
        while model["status"] == "registering":
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Model {model['id']!r} is still being read after {wait_seconds:g} s;"
                    " is a worker running (`grit status`)?"
                )
            time.sleep(0.1)
            model = self.get_model(model["id"])
        if model["status"] == "failed":
            reason = (model.get("failure") or {}).get("message", "no reason was recorded")
            raise InvalidInput(f"Model {model['id']!r} cannot be used: {reason}")
        return model

    def delete_model(self, model: str) -> None:
        """`DELETE /models/{id}`: forget a base model that no job and no adapter names."""
        self._connection.request("DELETE", path_of("models", model))

    def model_layers(self, model: str) -> dict[str, Any]:
        """`GET /models/{id}/layers`: the layers that can adapt, by modality."""
        answer = self._connection.json("GET", path_of("models", model, "layers"))
        return cast("dict[str, Any]", answer)
