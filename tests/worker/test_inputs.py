"""What a training process is handed, fetched from real rows and objects."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from grit_core.checkpoints import save_checkpoint
from grit_core.compression_job import compression_job_from_json
from grit_core.config.model_configs import (
    LayerSelectionStrategy,
    ModalityConfig,
    ModelGRITConfig,
    config_to_dict,
)
from grit_core.config.training import TrainingConfig
from grit_core.errors import InvalidDataset
from grit_core.plan import plan_adaptation, resolve_training
from grit_core.training_job import job_from_json
from store import adapters, attempts, datasets, jobs
from store.attempts import Claim
from store.database import transaction
from store.errors import ObjectCorrupt, ObjectMissing
from store.manifests import file_sha256
from store.models import AdapterOrigin, Dataset, DatasetStatus, JobKind
from store.objects import Objects
from store.settings import Settings
from tests.api.conftest import tiny_inventory
from tests.builders import MODEL, TEAM, claim, new_job, prepare
from tests.grit_core.test_checkpoints import checkpoint_at
from worker.inputs import fetch_inputs
from worker.scratch import DatasetCache, Scratch
from worker.workbench import Workbench

CONFIG = ModelGRITConfig(text=ModalityConfig(strategy=LayerSelectionStrategy.ALL), global_rank=2)
PLAN = plan_adaptation(CONFIG, tiny_inventory())
TRAINING = resolve_training(
    TrainingConfig(batch_size=3, max_length=64, precision="bfloat16", seed=5),
    num_rows=8,
    device="cpu",
)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256))}


@pytest.fixture
def bench(sqlite_engine: Engine, embedded_settings: Settings) -> Workbench:
    settings = embedded_settings
    return Workbench(
        settings=settings,
        engine=sqlite_engine,
        objects=Objects(settings),
        scratch=Scratch(settings.home, "wrk_1"),
        datasets=DatasetCache(settings.home, bound_bytes=1_000_000),
        worker_id="wrk_1",
    )


@pytest.fixture
def uploaded(bench: Workbench, tmp_path: Path) -> Callable[[str], str]:
    """Store rows of some words as a dataset, and return its id."""

    def upload(words: str) -> str:
        file = tmp_path / "upload.jsonl"
        file.write_text(words)
        sha256 = file_sha256(file)
        bench.objects.put_file(f"datasets/{sha256}.jsonl", file)
        with transaction(bench.engine) as session:
            prepare(session)
            return datasets.create_dataset(
                session,
                team=TEAM,
                status=DatasetStatus.READY,
                object_key=f"datasets/{sha256}.jsonl",
                sha256=sha256,
            ).id

    return upload


@pytest.fixture
def source(bench: Workbench, tmp_path: Path) -> str:
    """An adapter with its files; returns its id."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    bench.objects.put_folder("adapters/source", folder)
    with transaction(bench.engine) as session:
        prepare(session)
        return adapters.create_adapter(
            session, team=TEAM, origin=AdapterOrigin.JOB, model=MODEL, prefix="adapters/source"
        ).id


def claimed(bench: Workbench, dataset: str, **columns: Any) -> Claim:
    made = {
        "config": config_to_dict(CONFIG),
        "training": dataclasses.asdict(TRAINING),
        "plan": PLAN.to_json(),
        "plan_hash": PLAN.plan_hash,
    }
    with transaction(bench.engine) as session:
        jobs.create_job(session, team=TEAM, spec=new_job(dataset, **made, **columns))
    return claim(bench.engine)


def compression(source: str, **columns: Any) -> dict[str, Any]:
    request = {"adapter": source, "max_kl": 0.01, "num_rows": 33, "dataset": None, "name": None}
    kind = JobKind.COMPRESSION
    return {"kind": kind, "source_adapter_id": source, "request": request, **columns}


def test_a_training_gets_the_rows_to_train_on_to_evaluate_on_and_not_to_forget(
    bench: Workbench, uploaded: Callable[[str], str], tmp_path: Path
) -> None:
    held = claimed(
        bench,
        uploaded("new"),
        eval_dataset_id=uploaded("held out"),
        retention_dataset_id=uploaded("old"),
    )
    inputs = fetch_inputs(bench, held, work_dir=tmp_path / "work")
    assert inputs.order.keys() == {"job", "resume_from", "device_memory_share"}
    assert inputs.order["device_memory_share"] is None
    job = job_from_json(inputs.order["job"])
    assert job.eval_dataset is not None
    assert job.retention_dataset is not None
    read = [path.read_text() for path in (job.dataset, job.eval_dataset, job.retention_dataset)]
    assert read == ["new", "held out", "old"]
    assert (job.plan, inputs.order["resume_from"]) == (PLAN, None)


def test_every_order_carries_the_share_of_the_device_that_the_process_cannot_read_itself(
    bench: Workbench, uploaded: Callable[[str], str], tmp_path: Path
) -> None:
    settings = bench.settings.model_copy(update={"train_device_memory_share": 0.6})
    shared = dataclasses.replace(bench, settings=settings)
    inputs = fetch_inputs(shared, claimed(bench, uploaded("rows")), work_dir=tmp_path / "work")
    assert inputs.order["device_memory_share"] == 0.6


def test_without_a_retention_dataset_none_is_handed_over(
    bench: Workbench, uploaded: Callable[[str], str], tmp_path: Path
) -> None:
    inputs = fetch_inputs(bench, claimed(bench, uploaded("new")), work_dir=tmp_path / "work")
    assert job_from_json(inputs.order["job"]).retention_dataset is None


@pytest.mark.parametrize(
    ("columns", "called"),
    [
        ({"details": {"file_name": "chats.jsonl"}, "name": "chats"}, "chats.jsonl"),
        ({"details": {"format": "jsonl"}, "name": "chats"}, "chats"),
        ({"name": None}, None),
    ],
)
def test_a_training_is_told_what_the_user_calls_the_file(
    bench: Workbench,
    uploaded: Callable[[str], str],
    tmp_path: Path,
    columns: dict[str, Any],
    called: str | None,
) -> None:
    dataset = uploaded("rows")
    with transaction(bench.engine) as session:
        row = session.get_one(Dataset, dataset)
        for name, value in columns.items():
            setattr(row, name, value)
    inputs = fetch_inputs(bench, claimed(bench, dataset), work_dir=tmp_path / "work")
    job = job_from_json(inputs.order["job"])
    assert job.dataset_name == (called or dataset)
    assert (job.eval_dataset_name, job.retention_dataset_name) == (None, None)


@pytest.mark.parametrize(
    ("asked", "handed"),
    [({}, "auto"), ({"precision": "auto"}, "auto"), (None, "auto")]
    + [({"precision": each}, each) for each in ("float32", "bfloat16", "float16")],
)
def test_a_format_that_the_request_leaves_open_is_left_to_the_card(
    bench: Workbench,
    uploaded: Callable[[str], str],
    tmp_path: Path,
    asked: dict[str, str] | None,
    handed: str,
) -> None:
    dataset = uploaded("rows")
    held = claimed(bench, dataset, request={"dataset": dataset, "training": asked})
    inputs = fetch_inputs(bench, held, work_dir=tmp_path / "work")
    assert job_from_json(inputs.order["job"]).precision == handed


def test_a_compression_gets_the_adapter_and_the_settings_it_was_trained_with(
    bench: Workbench, uploaded: Callable[[str], str], source: str, tmp_path: Path
) -> None:
    columns = compression(source, eval_dataset_id=uploaded("held out"))
    held = claimed(bench, uploaded("rows"), **columns)
    inputs = fetch_inputs(bench, held, work_dir=tmp_path / "work")
    assert inputs.order.keys() == {"compression", "device_memory_share"}
    job = compression_job_from_json(inputs.order["compression"])
    assert {path.name: path.read_bytes() for path in job.adapter.iterdir()} == FILES
    assert job.adapter.is_relative_to(job.work_dir)
    assert job.eval_dataset is not None
    assert (job.dataset.read_text(), job.eval_dataset.read_text()) == ("rows", "held out")
    assert (job.max_kl, job.num_rows) == (0.01, 33)
    assert (job.batch_size, job.max_length, job.precision, job.seed) == (3, 64, "bfloat16", 5)
    assert (job.plan, job.config) == (PLAN, CONFIG)
    assert (job.model, job.model_name, job.device) == (MODEL, MODEL, "cpu")


def test_a_compression_of_an_adapter_that_was_not_made_here_has_no_plan(
    bench: Workbench, uploaded: Callable[[str], str], source: str, tmp_path: Path
) -> None:
    dataset = uploaded("rows")
    with transaction(bench.engine) as session:
        spec = new_job(dataset, **compression(source), training=dataclasses.asdict(TRAINING))
        spec = dataclasses.replace(spec, plan={}, plan_hash="", config={})
        jobs.create_job(session, team=TEAM, spec=spec)
    inputs = fetch_inputs(bench, claim(bench.engine), work_dir=tmp_path / "work")
    job = compression_job_from_json(inputs.order["compression"])
    assert (job.plan, job.config, job.precision) == (None, None, "auto")


def test_an_adapter_whose_files_are_gone_or_damaged_is_told(
    bench: Workbench, uploaded: Callable[[str], str], source: str, tmp_path: Path
) -> None:
    held = claimed(bench, uploaded("rows"), **compression(source))
    bench.objects.put_bytes("adapters/source/adapter_model.safetensors", bytes(256))
    with pytest.raises(ObjectCorrupt):
        fetch_inputs(bench, held, work_dir=tmp_path / "damaged")
    bench.objects.delete_prefix("adapters/source/")
    with pytest.raises(ObjectMissing):
        fetch_inputs(bench, held, work_dir=tmp_path / "gone")


def resumed_from(bench: Workbench, held: Claim, folder: Path) -> tuple[str | None, list[str]]:
    inputs = fetch_inputs(bench, held, work_dir=folder)
    found = inputs.order["resume_from"]
    return found and Path(found).name, [warning.message for warning in inputs.warnings]


@pytest.fixture
def checkpointed(bench: Workbench, uploaded: Callable[[str], str], tmp_path: Path) -> Claim:
    """A job whose first attempt stored the checkpoints of steps 2 and 4, claimed again."""
    first = claimed(bench, uploaded("rows"))
    for step in (2, 4):
        folder = tmp_path / f"own-{step}"
        save_checkpoint(folder, checkpoint_at(step))
        prefix = f"jobs/{first.job.id}/a1/step-{step}"
        manifest = bench.objects.put_folder(prefix, folder)
        with transaction(bench.engine) as session:
            attempts.save_checkpoint_pointer(
                session,
                job_id=first.job.id,
                attempt=1,
                step=step,
                prefix=prefix,
                manifest_sha256=manifest.sha256,
                size_bytes=manifest.size_bytes,
            )
    with transaction(bench.engine) as session:
        attempts.hand_back(session, job_id=first.job.id, attempt=1, reason="for the test")
    return claim(bench.engine)


def test_the_newest_whole_checkpoint_is_handed_over(
    bench: Workbench, checkpointed: Claim, tmp_path: Path
) -> None:
    assert resumed_from(bench, checkpointed, tmp_path / "work") == ("step-4", [])


def test_a_checkpoint_that_was_damaged_before_it_was_stored_is_passed_over(
    bench: Workbench, checkpointed: Claim, tmp_path: Path
) -> None:
    """The store's hashes are those of the damaged bytes; only the checkpoint's own tell."""
    prefix = f"jobs/{checkpointed.job.id}/a1/step-4"
    file = tmp_path / "own-4" / "step-4" / "state.json"
    file.write_bytes(file.read_bytes().replace(b"0.30000", b"0.40000"))
    bench.objects.delete_prefix(f"{prefix}/")
    manifest = bench.objects.put_folder(prefix, tmp_path / "own-4")
    with transaction(bench.engine) as session:
        row = attempts.list_checkpoints(session, checkpointed.job.id)[-1]
        row.manifest_sha256 = manifest.sha256
    found, warnings = resumed_from(bench, checkpointed, tmp_path / "work")
    assert found == "step-2"
    assert len(warnings) == 1
    assert "state.json is torn or was altered" in warnings[0]
    assert list(bench.objects.list(prefix)) == []


def test_another_folder_under_the_name_of_a_checkpoint_is_passed_over(
    bench: Workbench, checkpointed: Claim, tmp_path: Path
) -> None:
    """An older attempt's upload of the same step, for one: whole, and not what the row says."""
    prefix = f"jobs/{checkpointed.job.id}/a1/step-4"
    bench.objects.delete_prefix(f"{prefix}/")
    other = tmp_path / "other"
    save_checkpoint(other, dataclasses.replace(checkpoint_at(4), values={"progress": {}}))
    bench.objects.put_folder(prefix, other)
    found, warnings = resumed_from(bench, checkpointed, tmp_path / "work")
    assert found == "step-2"
    assert "another folder than was stored" in warnings[0]


def test_rows_that_differ_from_the_validated_ones_are_named_and_no_system_error(
    bench: Workbench, uploaded: Callable[[str], str], tmp_path: Path
) -> None:
    dataset = uploaded("rows")
    held = claimed(bench, dataset)
    (key,) = [stored.key for stored in bench.objects.list("datasets/")]
    bench.objects.put_bytes(key, b"r0ws")
    with pytest.raises(InvalidDataset, match=f"{dataset} are not those that were validated"):
        fetch_inputs(bench, held, work_dir=tmp_path / "work")
