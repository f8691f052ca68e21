"""What goes wrong while a run trains: memory, the disk, damaged checkpoints, values not finite."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from grit_core.checkpoint_files import step_folders
from grit_core.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from grit_core.data.rows import StepRows
from grit_core.errors import CheckpointCorrupt, InvalidDataset, TrainingDiverged
from grit_core.events import CheckpointSaved, StepCompleted, TrainingEvent, Warned
from grit_core.sampler import Sampler
from grit_core.training import train
from grit_core.training_job import TrainingJob
from grit_core.training_run import TrainingRun
from tests.grit_core.test_checkpoints import checkpoint_at
from tests.grit_core.training_jobs import tiny_job
from worker.failures import failure_of

FSYNC = os.fsync


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def reference(tmp: Path) -> TrainingJob:
    """A run that nothing disturbs; its checkpoints are those of steps 4 and 6."""
    job = tiny_job(tmp, work="reference")
    list(train(job))
    return job


def adapter_of(job: TrainingJob) -> bytes:
    return (job.work_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def numbers_of(events: list[TrainingEvent]) -> list[tuple[int, float, float]]:
    return [
        (event.step, event.train_loss, event.grad_norm)
        for event in events
        if isinstance(event, StepCompleted)
    ]


# --- memory


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to get 2 GiB.\nMore."), RuntimeError),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), torch.OutOfMemoryError),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), torch.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), MemoryError),
        (MemoryError(), MemoryError),
    ],
)
def test_a_lack_of_memory_tells_how_large_the_step_was(
    tmp: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    real = TrainingRun.forward_backward

    def full_at_step_3(run: TrainingRun, rows: StepRows, *, observe: bool = True) -> torch.Tensor:
        if run.progress.step == 3:
            raise error
        return real(run, rows, observe=observe)

    monkeypatch.setattr(TrainingRun, "forward_backward", full_at_step_3)
    job = tiny_job(tmp, work="memory")
    with pytest.raises(kind) as raised:
        list(train(job))
    message = str(raised.value)
    assert message.startswith("step 3 has micro-batches of 2 rows of ")
    for part in ("tokens", "pixel values", "layers of ranks 2 to 4"):
        assert part in message
    assert "\n" not in message


def test_rows_that_the_model_refuses_are_named_by_their_lines_and_are_the_users(
    tmp_path: Path,
) -> None:
    job = tiny_job(tmp_path, num_rows=6)
    config = Path(job.model) / "config.json"
    other_token = {**json.loads(config.read_text()), "image_token_id": 8}
    config.write_text(json.dumps(other_token))
    with pytest.raises(InvalidDataset) as caught:
        list(train(job))
    first = Sampler(rows=tuple(range(6)), rows_per_step=2, seed=job.training.seed).rows_of(0)
    lines = ", ".join(str(index + 1) for index in sorted(first))
    named = f"{job.dataset.name}, step 1, among lines {lines}: the model refuses"
    assert named in str(caught.value)
    failure = failure_of(caught.value)
    assert (failure.code, failure.category, failure.retryable) == ("dataset_invalid", "user", False)


def test_another_error_keeps_its_words(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(TrainingRun, "forward_backward", broken)
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access"):
        list(train(tiny_job(tmp, work="illegal")))


# --- the disk


def failing_fsync(calls: Callable[[int], bool]) -> Callable[[int], None]:
    numbers = iter(range(1, 10_000))

    def fsync(descriptor: int) -> None:
        if calls(next(numbers)):
            raise OSError(5, "Input/output error")
        FSYNC(descriptor)

    return fsync


def test_a_failed_fsync_at_any_point_saves_nothing_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = 0
    for number in range(1, 20):
        folder = tmp_path / str(number)
        save_checkpoint(folder, checkpoint_at(4))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing_fsync(lambda call, number=number: call == number))  # type: ignore[misc] # a default binds the loop's value
            try:
                save_checkpoint(folder, checkpoint_at(6))
            except OSError:
                failed += 1
            else:
                break
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        found, passed_over = latest_checkpoint(folder)
        assert found is not None
        assert found.name in {"step-4", "step-6"}
        assert passed_over == []
        save_checkpoint(folder, checkpoint_at(6))
        assert load_checkpoint(folder / "step-6").step == 6
    assert failed == 7  # five files and two folders


def test_a_disk_that_fails_for_a_while_costs_a_checkpoint_and_nothing_else(
    tmp: Path, reference: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp, work="broken-disk")
    events: list[TrainingEvent] = []
    for event in train(job):
        events.append(event)
        if isinstance(event, StepCompleted):
            broken = event.step == 4
            monkeypatch.setattr(os, "fsync", failing_fsync(lambda _, broken=broken: broken))  # type: ignore[misc] # as above
    warned = [
        event for event in events if isinstance(event, Warned) and event.code != "diagonal_is_adam"
    ]
    assert [event.code for event in warned] == ["checkpoint_not_saved"]
    assert "step 4" in warned[0].message
    assert "Input/output error" in warned[0].message
    saved = [event.step for event in events if isinstance(event, CheckpointSaved)]
    assert saved == [2, 6]
    assert [folder.name for folder in step_folders(job.work_dir / "checkpoints")] == [
        "step-2",
        "step-6",
    ]
    assert adapter_of(job) == adapter_of(reference)


# --- damaged checkpoints


def mutations(folder: Path, older: Path) -> Iterator[tuple[str, Path]]:
    """Damage one file of a checkpoint after the other; undone before the next."""
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        damages = {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "one byte short": whole[:-1],
            "longer": whole + b"\0",
            "first bit": bytes([whole[0] ^ 1]) + whole[1:],
            "middle bit": whole[: len(whole) // 2]
            + bytes([whole[len(whole) // 2] ^ 16])
            + whole[len(whole) // 2 + 1 :],
            "last bit": whole[:-1] + bytes([whole[-1] ^ 128]),
            "of an older step": (older / path.name).read_bytes(),
        }
        for name, data in damages.items():
            if data != whole:
                path.write_bytes(data)
                yield f"{path.name}: {name}", path
        path.unlink()
        yield f"{path.name}: gone", path
        path.write_bytes(whole)


def test_every_damage_of_every_file_falls_back_and_ends_with_the_same_bytes(
    tmp: Path, reference: TrainingJob
) -> None:
    checkpoints = tmp / "damaged"
    shutil.copytree(reference.work_dir / "checkpoints", checkpoints)
    older, newer = step_folders(checkpoints)
    found_for = []
    for name, _ in mutations(newer, older):
        found, passed_over = latest_checkpoint(checkpoints)
        assert found == older, name
        assert len(passed_over) == 1, name
        with pytest.raises(CheckpointCorrupt):
            load_checkpoint(newer)
        found_for.append(name)
    assert len(found_for) >= 40
    assert latest_checkpoint(checkpoints) == (newer, [])

    shutil.rmtree(newer)
    shutil.copytree(older, newer)  # a whole older checkpoint under the newer one's name
    found, passed_over = latest_checkpoint(checkpoints)
    assert found == older
    assert passed_over == ["step-6 holds the checkpoint of step 4."]
    job = tiny_job(tmp, work="fallen-back")
    list(train(job, resume_from=found))
    assert adapter_of(job) == adapter_of(reference)


# --- values that are not finite


def test_a_run_that_diverges_keeps_a_checkpoint_of_finite_values_alone(
    tmp: Path, reference: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainingRun.forward_backward

    def poisoned_at_step_5(
        run: TrainingRun, rows: StepRows, *, observe: bool = True
    ) -> torch.Tensor:
        loss = real(run, rows, observe=observe)
        if run.progress.step == 5:
            next(iter(run.parameters.values())).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr] # it has one
        return loss

    job = tiny_job(tmp, work="poisoned")
    events: list[TrainingEvent] = []
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "forward_backward", poisoned_at_step_5)
        with pytest.raises(TrainingDiverged, match="step 5"):
            events.extend(train(job))
    assert [step for step, *_ in numbers_of(events)] == [1, 2, 3, 4]
    found, passed_over = latest_checkpoint(job.work_dir / "checkpoints")
    assert found is not None
    assert (found.name, passed_over) == ("step-4", [])
    for tensors in load_checkpoint(found).tensors.values():
        for name, tensor in tensors.items():
            assert torch.isfinite(tensor).all(), name
    again = tiny_job(tmp, work="mended")
    list(train(again, resume_from=found))
    assert adapter_of(again) == adapter_of(reference)


# --- metrics


def test_after_kills_the_steps_told_are_those_of_a_run_without(
    tmp: Path, reference: TrainingJob
) -> None:
    """As a worker keeps them: what was told after the checkpoint is told again, and replaces it."""
    undisturbed = numbers_of(list(train(tiny_job(tmp, work="undisturbed"))))
    kept: dict[int, tuple[int, float, float]] = {}
    job = tiny_job(tmp, work="killed")
    for dies_after in (1, 3, 5, 6):
        found, _ = latest_checkpoint(job.work_dir / "checkpoints")
        start = 0 if found is None else load_checkpoint(found).step
        kept = {step: told for step, told in kept.items() if step <= start}
        for event in train(job, resume_from=found):
            if isinstance(event, StepCompleted):
                assert event.step not in kept
                kept[event.step] = (event.step, event.train_loss, event.grad_norm)
                if event.step == dies_after and dies_after < 6:
                    break  # nothing after this event happens
    assert list(kept.values()) == undisturbed
    assert adapter_of(job) == adapter_of(reference)
