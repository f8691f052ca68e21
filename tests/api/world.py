"""Rows of every kind in every state, for requests that are to reach beyond "not found"."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from api.services import Services
from store import adapters, attempts, base_models, datasets, events
from store.database import transaction
from store.ids import new_id
from store.keys import Scope, create_key
from store.models import AdapterOrigin, DatasetStatus
from store.retries import Failure
from tests.api.conftest import MODEL, Team

LAYER: Final = "model.text_model.layers.0.self_attn.q_proj"


class World:
    """One team's rows."""

    def __init__(self, team: Team, services: Services, folder: Path) -> None:
        self.team, self.services = team, services
        self.folder = adapter_folder(folder / "adapter")
        self.adapter_archive = zipped(self.folder)
        self.dataset = team.dataset(4)
        refused = team.upload(b'{"messages": []}\n')
        self.datasets = [self.dataset, str(refused.json()["dataset"])]
        self.adapter = self.new_adapter()
        self.ended_jobs = self._ended()
        """Nobody moves or deletes these."""
        self.jobs = [
            *self._ended(),
            self._running(),
            self.new_job(),
            self.new_job(auto_start=False),
            self._moved("pause"),
        ]

    def _ended(self) -> list[str]:
        return [self._succeeded(), self._failed(), self._moved("cancel")]

    def new_job(self, **fields: Any) -> str:
        return str(self.team.job(dataset=self.dataset, **fields)["id"])

    def new_adapter(self) -> str:
        """An adapter that can be downloaded in each layout."""
        made = new_id("adp")
        self.services.objects.put_folder(f"adapters/{made}", self.folder)
        with transaction(self.services.engine) as session:
            row = adapters.create_adapter(
                session,
                team=self.team.name,
                origin=AdapterOrigin.IMPORT,
                model=MODEL,
                prefix=f"adapters/{made}",
                name="real",
            )
            return row.id

    def new_dataset(self) -> str:
        """Another one of the same content, which takes no upload."""
        with transaction(self.services.engine) as session:
            first = datasets.get_dataset(session, self.dataset, team=self.team.name)
            row = datasets.create_dataset(
                session,
                team=self.team.name,
                status=DatasetStatus.READY,
                object_key=first.object_key,
                sha256=first.sha256,
                size_bytes=first.size_bytes,
                num_rows=first.num_rows,
                num_images=first.num_images,
            )
            return row.id

    def new_model(self) -> str:
        """A base model that nothing names."""
        with transaction(self.services.engine) as session:
            return base_models.register(session, id=f"base-{new_id('job')}", source="/gone").id

    def new_key(self) -> str:
        with transaction(self.services.engine) as session:
            row, _ = create_key(session, team=self.team.name, name="x", scopes={Scope.READ})
            return row.id

    def _moved(self, action: str) -> str:
        job = self.new_job()
        assert self.team.post(f"/jobs/{job}/{action}").status_code == 200
        return job

    def _running(self) -> str:
        job = self.new_job()
        self._claim(job)
        return job

    def _claim(self, job: str) -> int:
        with transaction(self.services.engine) as session:
            claim = attempts.claim_next(session, queue="cpu", worker_id="wrk_1", lease_seconds=9999)
        assert claim is not None
        assert claim.job.id == job
        return claim.attempt

    def _succeeded(self) -> str:
        job = self.new_job()
        attempt = self._claim(job)
        told = {
            "type": "step_completed",
            "step": 1,
            "total_steps": 2,
            "epoch": 0.5,
            "train_loss": 1.5,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "num_tokens": 10,
            "tokens_per_second": 5.0,
            "elapsed_seconds": 1.0,
        }
        result = {"final_loss": 0.5, "retention": None, "compaction": None}
        with transaction(self.services.engine) as session:
            events.record_progress(session, job, attempt, [told])
            attempts.save_checkpoint_pointer(
                session,
                job_id=job,
                attempt=attempt,
                step=1,
                prefix=f"jobs/{job}/1",
                manifest_sha256="a" * 64,
                size_bytes=10,
            )
            attempts.complete(
                session,
                job_id=job,
                attempt=attempt,
                adapter=attempts.NewAdapter(id=new_id("adp"), prefix=f"adapters/{job}"),
                result=result,
            )
        return job

    def _failed(self) -> str:
        job = self.new_job()
        failure = Failure(code="diverged", message="The loss is not finite.")
        attempt = self._claim(job)
        with transaction(self.services.engine) as session:
            attempts.fail(session, job_id=job, attempt=attempt, failure=failure)
        return job


def zipped(folder: Path) -> bytes:
    """Return a zip of a folder's files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return buffer.getvalue()


def adapter_folder(folder: Path) -> Path:
    """Write a plain adapter of one layer."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": np.ones((3, 128), np.float32),
        f"base_model.model.{LAYER}.lora_B.weight": np.ones((128, 3), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [LAYER]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
