"""Datasets: rows to train on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

from grit_client.answers import Dataset
from grit_client.calls.resource import MAX_PAGE, Calls, path_of
from grit_client.uploads import OnProgress, multipart_file

UPLOAD_SILENCE_SECONDS = 600.0
"""The service checks every row before it answers."""


class DatasetCalls(Calls):
    """Calls under `/datasets`."""

    def upload_dataset(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        on_bad_rows: Literal["reject", "skip"] = "reject",
        on_progress: OnProgress | None = None,
    ) -> Dataset:
        """`POST /datasets`: send JSONL, a zip or tar of JSONL and images, or Parquet.

        Args:
            path: The file; it is streamed, never held in memory.
            name: By default the file's name.
            on_bad_rows: `reject` refuses the whole file, with every bad row named; `skip` leaves
                the bad rows out and counts them.
            on_progress: Called with the bytes sent so far and the bytes in all.
        """
        file = Path(path).expanduser()
        fields = {"name": name or file.name, "on_bad_rows": on_bad_rows}
        answer = self._connection.json(
            "POST",
            "/datasets",
            body=lambda: multipart_file(file, fields, on_progress=on_progress),
            silence_seconds=UPLOAD_SILENCE_SECONDS,
            idempotent=False,
        )
        return cast("Dataset", answer)

    def list_datasets(self, *, name: str | None = None) -> Iterator[Dataset]:
        """`GET /datasets`: every dataset of the team, or those of a name, newest first."""
        params = {"name": name, "limit": MAX_PAGE}
        return cast("Iterator[Dataset]", self._pages("/datasets", params))

    def get_dataset(self, dataset: str) -> Dataset:
        """`GET /datasets/{id}`."""
        return cast("Dataset", self._connection.json("GET", path_of("datasets", dataset)))

    def dataset_report(self, dataset: str) -> dict[str, Any]:
        """`GET /datasets/{id}/report`: every bad row with line, JSON path and reason."""
        answer = self._connection.json("GET", path_of("datasets", dataset, "report"))
        return cast("dict[str, Any]", answer)

    def delete_dataset(self, dataset: str) -> None:
        """`DELETE /datasets/{id}`."""
        self._connection.request("DELETE", path_of("datasets", dataset))
