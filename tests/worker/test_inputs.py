"""What a training process is handed, fetched from real rows and objects."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from grit_core.compression_job import compression_job_from_json
from grit_core.config.model_configs import (
    LayerSelectionStrategy,
    ModalityConfig,
    ModelGRITConfig,
    config_to_dict,
)
from grit_core.config.training import TrainingConfig
from grit_core.plan import plan_adaptation, resolve_training
from grit_core.training_job import job_from_json
from store import adapters, datasets, jobs
from store.attempts import Claim
from store.database import transaction
from store.errors import ObjectCorrupt, ObjectMissing
from store.manifests import file_sha256
from store.models import AdapterOrigin, DatasetStatus, JobKind
from store.objects import Objects
from store.settings import Settings
from tests.api.conftest import tiny_inventory
from tests.builders import MODEL, TEAM, claim, new_job, prepare
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
    assert inputs.order.keys() == {"job", "resume_from"}
    job = job_from_json(inputs.order["job"])
    assert job.eval_dataset is not None
    assert job.retention_dataset is not None
    read = [path.read_text() for path in (job.dataset, job.eval_dataset, job.retention_dataset)]
    assert read == ["new", "held out", "old"]
    assert (job.plan, inputs.order["resume_from"]) == (PLAN, None)


def test_without_a_retention_dataset_none_is_handed_over(
    bench: Workbench, uploaded: Callable[[str], str], tmp_path: Path
) -> None:
    inputs = fetch_inputs(bench, claimed(bench, uploaded("new")), work_dir=tmp_path / "work")
    assert job_from_json(inputs.order["job"]).retention_dataset is None


def test_a_compression_gets_the_adapter_and_the_settings_it_was_trained_with(
    bench: Workbench, uploaded: Callable[[str], str], source: str, tmp_path: Path
) -> None:
    columns = compression(source, eval_dataset_id=uploaded("held out"))
    held = claimed(bench, uploaded("rows"), **columns)
    inputs = fetch_inputs(bench, held, work_dir=tmp_path / "work")
    assert inputs.order.keys() == {"compression"}
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
    assert (job.plan, job.config) == (None, None)


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
