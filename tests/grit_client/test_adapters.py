"""Downloads of adapters, from the real service."""

from collections.abc import Callable
from pathlib import Path

import pytest

from grit_client.client import GritClient
from grit_client.errors import InvalidInput, NotFound
from store.adapters import create_adapter
from store.database import transaction
from store.models import AdapterOrigin
from tests.api.conftest import MODEL
from tests.grit_client.conftest import Ran, Service

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 5000}


@pytest.fixture
def adapter(service: Service) -> str:
    folder = service.folder / "made"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    service.services.objects.put_folder("adapters/one", folder)
    with transaction(service.services.engine) as session:
        return create_adapter(
            session,
            team="default",
            origin=AdapterOrigin.IMPORT,
            model=MODEL,
            prefix="adapters/one",
        ).id


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_download_is_the_folder_that_was_stored(
    client: GritClient, adapter: str, tmp_path: Path
) -> None:
    told: list[int] = []
    folder = client.download_adapter(
        adapter, tmp_path / "a" / "b", on_progress=lambda received, _: told.append(received)
    )
    assert FILES.items() <= contents(folder).items()
    assert told[-1] > len(FILES["adapter_model.safetensors"])
    # The folder alone: nothing of the download stays beside it.
    assert [path.name for path in folder.parent.iterdir()] == ["b"]
    assert [item["id"] for item in client.list_adapters()] == [adapter]
    assert list(client.list_adapters(job="job_x")) == []


def test_a_folder_with_something_in_it_is_left_alone(
    client: GritClient, adapter: str, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(InvalidInput, match="not an empty folder"):
        client.download_adapter(adapter, tmp_path / "full")
    assert contents(tmp_path / "full") == {"mine": b"keep"}


def test_a_failed_download_leaves_nothing(client: GritClient, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        client.download_adapter("adp_x", tmp_path / "new" / "folder")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_command_line_downloads_into_a_folder(
    grit: Callable[..., Ran], adapter: str, tmp_path: Path
) -> None:
    done = grit("adapters", "download", adapter, "--json")
    assert done.code == 0, done.err
    assert Path(done.json["folder"]) == tmp_path / adapter
    assert FILES.items() <= contents(tmp_path / adapter).items()
    assert grit("adapters", "delete", adapter).code == 0
    assert grit("adapters", "show", adapter).code == 5
