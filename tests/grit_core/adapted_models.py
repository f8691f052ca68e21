"""A small VLM with a trained adapter, and rows to weigh its directions on."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from grit_core.calibration import Calibration, ChosenRows
from grit_core.data.encoder import ChatEncoder
from grit_core.data.rows import EncodedRows
from grit_core.models.pretrained import known_warnings_ignored, load_base_model, load_processor
from grit_core.row_file import RowFile
from grit_core.training_job import TrainingJob


def load_trained(job: TrainingJob, folder: Path | None = None) -> PeftModel:
    """Load an adapter with plain PEFT, its matrices trainable."""
    with known_warnings_ignored():
        return PeftModel.from_pretrained(
            load_base_model(job.model),
            str(folder or job.work_dir / "adapter"),
            is_trainable=True,
        )


def rows_of(job: TrainingJob, indices: Sequence[int], *, size: int = 4) -> ChosenRows:
    """Rows of the job's dataset in batches of `size`."""
    rows = EncodedRows(RowFile(job.dataset), ChatEncoder(load_processor(job.model)), max_length=512)
    return ChosenRows(indices, lambda i: rows.step_rows(i, batch_size=len(i)), size=size)


def calibration_of(job: TrainingJob, model: PeftModel, *, size: int = 4) -> Calibration:
    """All rows of the job's dataset, to weigh a model's directions on."""
    num_rows = len(RowFile(job.dataset))
    return Calibration(model, rows_of(job, range(num_rows), size=size))
