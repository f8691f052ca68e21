"""Downloads and compressions of adapters, from the real service."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from grit_client.client import GritClient
from grit_client.errors import InvalidInput, NotFound, RequestRefused
from store import attempts
from store.adapters import create_adapter
from store.attempts import NewAdapter
from store.database import transaction
from store.ids import new_id
from store.models import AdapterOrigin
from tests.api.conftest import MODEL, job_body
from tests.grit_client.conftest import Ran, Service

WEIGHTS = "adapter_model.safetensors"
FILES = {"adapter_config.json": b"{}", WEIGHTS: bytes(range(256)) * 5000}


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
    assert told[-1] > len(FILES[WEIGHTS])
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


@pytest.fixture
def trained(service: Service, client: GritClient) -> tuple[str, str, str]:
    """A succeeded job, its dataset and its adapter."""
    dataset = client.upload_dataset(service.rows_file())["id"]
    job = client.create_job(job_body(dataset))["id"]
    return job, dataset, succeed(service, result={"final_loss": 0.5})


def succeed(service: Service, *, result: dict[str, Any], **details: Any) -> str:
    """Play the worker of the next job."""
    adapter = new_id("adp")
    with transaction(service.services.engine) as session:
        claim = attempts.claim_next(session, queue="cpu", worker_id="wrk_1", lease_seconds=60)
        assert claim is not None
        attempts.complete(
            session,
            job_id=claim.job.id,
            attempt=claim.attempt,
            adapter=NewAdapter(id=adapter, prefix=f"adapters/{adapter}", details=details),
            result=result,
        )
    return adapter


def test_an_adapter_is_compressed_once_however_often_it_is_asked_for(
    client: GritClient, service: Service, trained: tuple[str, str, str]
) -> None:
    _, dataset, adapter = trained
    job = client.compress_adapter(adapter, max_kl=0.01, num_rows=9, name="small")
    assert (job["kind"], job["source_adapter"], job["dataset"]) == ("compression", adapter, dataset)
    assert job["compression"] == {"max_kl": 0.01, "num_rows": 9}
    first = client.compress_adapter(adapter, idempotency_key="once")
    again = client.compress_adapter(adapter, idempotency_key="once")
    assert first["id"] == again["id"] != job["id"]
    assert first["compression"] == {"max_kl": 1e-05, "num_rows": 256}
    other = client.upload_dataset(service.rows_file(3))["id"]
    assert client.compress_adapter(adapter, dataset=other)["dataset"] == other
    with pytest.raises(RequestRefused, match="still used"):
        client.delete_adapter(adapter)
    with pytest.raises(NotFound):
        client.compress_adapter("adp_x")


def test_the_command_line_compresses_an_adapter_and_shows_what_was_cut(
    grit: Callable[..., Ran], service: Service, trained: tuple[str, str, str]
) -> None:
    _, dataset, adapter = trained
    options = ("--max-kl", 0.002, "--rows", 7, "--name", "small", "--idempotency-key", "once")
    created = grit("adapters", "compress", adapter, *options, "--json")
    assert created.code == 0, created.err
    job = created.json
    assert (job["name"], job["dataset"]) == ("small", dataset)
    assert job["compression"] == {"max_kl": 0.002, "num_rows": 7}
    assert grit("adapters", "compress", adapter, *options, "--json").json["id"] == job["id"]
    shown = grit("job", job["id"]).out
    assert "compression" in shown
    assert adapter in shown
    compaction = {
        "ranks": {"a": 3, "b": 5},
        "parameters_before": 1000,
        "parameters_after": 400,
        "predicted_kl": 0.0015,
        "max_kl": 0.002,
        "eval_loss_before": 0.5,
        "eval_loss_after": 0.5012,
    }
    made = succeed(service, result={"compaction": compaction}, ranks=compaction["ranks"])
    # It has ended: following it shows its result.
    ended = grit("adapters", "compress", adapter, *options, "--watch")
    assert ended.code == 0, ended.err
    assert made in ended.out
    assert "1,000 -> 400 parameters (-60%), predicted KL 0.0015 of at most 0.002" in ended.out
    assert "0.5000 -> 0.5012" in ended.out
    described = grit("adapters", "show", made).out
    assert "3 to 5 over 2 layers" in described
    assert adapter in described


def test_the_command_line_uploads_the_rows_to_compress_on_and_names_what_is_wrong(
    grit: Callable[..., Ran], service: Service, trained: tuple[str, str, str]
) -> None:
    _, dataset, adapter = trained
    rows = service.rows_file(4)
    job = grit("adapters", "compress", adapter, "--dataset", rows, "--json")
    assert job.code == 0, job.err
    assert job.json["dataset"] not in {dataset, None}
    refused = grit("adapters", "compress", adapter, "--max-kl", 11)
    assert refused.code == 2
    assert "max_kl is 11.0; give" in refused.err
    neither = grit("adapters", "compress", adapter, "--dataset", "rows")
    assert neither.code == 2
    assert "--dataset: there is no file 'rows'" in neither.err
    assert grit("adapters", "compress", "adp_x").code == 5


@pytest.fixture
def saved(service: Service) -> Path:
    """A folder as PEFT's training leaves it, with more in it than an adapter."""
    folder = service.folder / "saved"
    folder.mkdir()
    layer = "base_model.model.model.text_model.layers.0.self_attn.q_proj"
    shapes = {f"{layer}.lora_A.weight": (4, 128), f"{layer}.lora_B.weight": (128, 4)}
    save_file(
        {name: np.ones(shape, "f4") for name, shape in shapes.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "training_args.bin").write_bytes(b"a pickle that stays here")
    return folder


def test_an_adapter_of_a_folder_or_an_archive_is_imported_once(
    client: GritClient, saved: Path, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    made = client.import_adapter(
        saved, model=MODEL, name="mine", on_progress=lambda *sent: told.append(sent)
    )
    assert (made["origin"], made["name"], made["model"]) == ("import", "mine", MODEL)
    assert told[-1][0] == told[-1][1] > 4096
    (saved / "training_args.bin").unlink()
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", saved)
    assert client.import_adapter(archive, model=MODEL)["id"] == made["id"]
    folder = client.download_adapter(made["id"], tmp_path / "back")
    assert (folder / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


def test_the_command_line_writes_a_folder_for_vllm(
    grit: Callable[..., Ran], client: GritClient, saved: Path, tmp_path: Path
) -> None:
    adapter = client.import_adapter(saved, model=MODEL)["id"]
    options = ("--layout", "vllm", "--to", tmp_path / "vllm")
    done = grit("adapters", "download", adapter, *options, "--tower-connector")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    both = ("--language-only", "--tower-connector", "--to", tmp_path / "both")
    assert "language_only" in grit("adapters", "download", adapter, *options[:2], *both).err


def test_a_folder_that_is_no_adapter_is_not_sent(client: GritClient, saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(InvalidInput, match=WEIGHTS):
        client.import_adapter(saved, model=MODEL)
    with pytest.raises(InvalidInput, match="cannot be read"):
        client.import_adapter(saved / "nothing", model=MODEL)


def test_the_command_line_imports_an_adapter_and_names_what_is_wrong(
    grit: Callable[..., Ran], saved: Path
) -> None:
    done = grit("adapters", "import", saved, "--model", MODEL, "--json")
    assert done.code == 0, done.err
    shown = grit("adapters", "import", saved, "--model", MODEL)
    assert done.json["id"] in shown.out
    assert "import" in shown.out
    refused = grit("adapters", "import", saved, "--model", "unknown")
    assert refused.code == 2
    assert "not registered" in refused.err
    config = saved / "adapter_config.json"
    config.write_text(config.read_text().replace("LORA", "IA3"))
    refused = grit("adapters", "import", saved, "--model", MODEL)
    assert refused.code == 2
    assert "IA3" in refused.err
