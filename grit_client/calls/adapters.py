"""Adapters: what jobs leave behind and what was trained elsewhere, as PEFT folders."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast
from urllib.parse import quote
from uuid import uuid4

import httpx

from grit_client.answers import Adapter, Job
from grit_client.archives import unpack
from grit_client.calls.resource import MAX_PAGE, Calls, path_of
from grit_client.errors import InvalidInput, ServiceUnreachable
from grit_client.uploads import OnProgress, multipart_file

IMPORT_SILENCE_SECONDS: Final = 600.0
"""The service looks at every number before it answers."""
IMPORTED_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")


class AdapterCalls(Calls):
    """Calls under `/adapters`."""

    def list_adapters(
        self, *, job: str | None = None, model: str | None = None, name: str | None = None
    ) -> Iterator[Adapter]:
        """`GET /adapters`: every adapter of the team that passes the filters, newest first."""
        params = {"model": model, "name": name, "limit": MAX_PAGE}
        for adapter in self._pages("/adapters", params):
            if job is None or adapter["job"] == job:
                yield cast("Adapter", adapter)

    def get_adapter(self, adapter: str) -> Adapter:
        """`GET /adapters/{id}`."""
        return cast("Adapter", self._connection.json("GET", path_of("adapters", adapter)))

    def import_adapter(
        self,
        path: str | Path,
        *,
        model: str,
        name: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Adapter:
        """`POST /adapters`: import a LoRA adapter that PEFT saved, trained anywhere.

        Importing the same content again, with the same name or without one, answers with the
        adapter that is there.

        Args:
            path: The folder, of which adapter_config.json and adapter_model.safetensors are sent,
                or an archive of these two.
            model: The registered base model that it was trained on.
            name: What to call it.
            on_progress: Called with the bytes sent so far and the bytes in all.

        A folder that lacks one of the files raises `InvalidInput`.
        """
        fields = {"model": model} | ({} if name is None else {"name": name})
        with _archive_of(Path(path).expanduser()) as archive:
            answer = self._connection.json(
                "POST",
                "/adapters",
                body=lambda: multipart_file(archive, fields, on_progress=on_progress),
                silence_seconds=IMPORT_SILENCE_SECONDS,
                idempotent=True,
            )
        return cast("Adapter", answer)

    def download_adapter(
        self,
        adapter: str,
        folder: str | Path,
        *,
        layout: str = "peft",
        language_only: bool = False,
        tower_connector: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Path:
        """`GET /adapters/{id}/download`: fetch a PEFT folder that any PEFT program can load.

        The folder appears whole or not at all.

        Args:
            adapter: The adapter's id.
            folder: Where to put it; it must not exist, or be empty.
            layout: `peft`, or `vllm` for a folder that vLLM serves too: one rank, one scale.
            language_only: For vLLM, leave out layers outside of the language model.
            tower_connector: Take those layers too, for a vLLM that adapts them.
            on_progress: Called with the bytes received so far and in all (0 when unknown).

        Raises:
            InvalidInput: The folder is not empty.
        """
        target = Path(folder).expanduser().absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InvalidInput(f"{target} is not an empty folder; name another with --to.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as scratch:
            archive, fresh = Path(scratch, "archive"), Path(scratch, "adapter")
            path = path_of("adapters", adapter, "download")
            if layout != "peft":
                wanted = {"language_only": language_only, "tower_connector": tower_connector}
                flags = "".join(f"&{name}=true" for name, given in wanted.items() if given)
                path += f"?layout={quote(layout)}{flags}"
            self._fetch(path, archive, on_progress)
            unpack(archive, fresh)
            if target.exists():
                target.rmdir()
            shutil.move(_only_folder(fresh), target)
        return target

    def compress_adapter(
        self,
        adapter: str,
        *,
        max_kl: float | None = None,
        dataset: str | None = None,
        num_rows: int | None = None,
        name: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """`POST /adapters/{id}/compress`: create a job that cuts an adapter's weakest directions.

        The job's result is a new adapter; the old one stays as it is. Sent again on a broken
        connection without creating two.

        Args:
            adapter: The adapter's id.
            max_kl: Longest predicted divergence from the adapter as it is, in nats for a label
                token; None leaves it to the service.
            dataset: A dataset's id, to measure curvature on; by default the one that the adapter
                was trained on.
            num_rows: At most so many of its rows; None leaves it to the service.
            name: What the job and the new adapter are called.
            idempotency_key: Your own name for this request, so that another process can repeat it;
                by default a fresh one.
        """
        fields = {"max_kl": max_kl, "dataset": dataset, "num_rows": num_rows, "name": name}
        body = {field: value for field, value in fields.items() if value is not None}
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        path = path_of("adapters", adapter, "compress")
        answer = self._connection.json("POST", path, json=body, headers=headers, idempotent=True)
        return cast("Job", answer)

    def delete_adapter(self, adapter: str) -> None:
        """`DELETE /adapters/{id}`; refused while a job that has not ended is to compress it."""
        self._connection.request("DELETE", path_of("adapters", adapter))

    def _fetch(self, path: str, archive: Path, on_progress: OnProgress | None) -> None:
        headers = {"Accept": "*/*"}
        with (
            self._connection.stream("GET", path, headers=headers) as response,
            archive.open("wb") as file,
        ):
            total = int(response.headers.get("Content-Length", 0))
            received = 0
            for chunk in response.iter_bytes():
                file.write(chunk)
                received += len(chunk)
                if on_progress is not None:
                    on_progress(received, total)
            _check_length(response, received=received, total=total)


@contextmanager
def _archive_of(path: Path) -> Iterator[Path]:
    """A file as it is, and of a folder a tar of its two files.

    Raises:
        InvalidInput: The folder lacks one of them.
    """
    if not path.is_dir():
        yield path
        return
    missing = [name for name in IMPORTED_FILES if not (path / name).is_file()]
    if missing:
        raise InvalidInput(
            f"{path} has no {' and no '.join(missing)}; name the folder that PEFT's save_pretrained"
            " wrote, with safetensors."
        )
    with tempfile.TemporaryDirectory(prefix="grit-import-") as scratch:
        archive = Path(scratch, "adapter.tar")
        with tarfile.open(archive, "w") as container:
            for name in IMPORTED_FILES:
                with (path / name).open("rb") as file:
                    info = tarfile.TarInfo(name)
                    info.size = (path / name).stat().st_size
                    container.addfile(info, file)
        yield archive


def _check_length(response: httpx.Response, *, received: int, total: int) -> None:
    if total and "Content-Encoding" not in response.headers and received != total:
        raise ServiceUnreachable(f"The download broke off at {received} of {total} bytes.")


def _only_folder(folder: Path) -> Path:
    # An archive may hold the adapter's files, or one folder with them.
    entries = list(folder.iterdir())
    if len(entries) == 1 and entries[0].is_dir():
        return entries[0]
    return folder
