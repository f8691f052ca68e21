"""The rows of a training job: which are trained on, evaluated on and kept for retention."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import transformers

from grit_core.data.encoder import ChatEncoder
from grit_core.data.rows import EncodedRows
from grit_core.durable_files import canonical_json
from grit_core.models.pretrained import load_processor
from grit_core.row_check import RowSet
from grit_core.row_file import RowFile
from grit_core.sampler import choose_rows, split_rows
from grit_core.training_job import TrainingJob

CHECK_VERSION: Final = 1
"""Raise it when a check finds more than before, so that resumed jobs are checked again."""


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """A job's files, opened, and which of their rows are for what."""

    encoder: ChatEncoder
    train: EncodedRows
    train_indices: Sequence[int]
    evaluation: EncodedRows
    """The rows of `train` where the job holds a share of them out."""

    eval_indices: Sequence[int]
    """At most `training.max_eval_rows` of `eval_candidates`, chosen by the seed."""

    eval_candidates: Sequence[int]
    retention: EncodedRows | None
    retention_indices: Sequence[int]
    """Likewise, of all rows of the retention file."""

    def sets(self) -> list[RowSet]:
        """All rows by their purpose; those that are left aside by `max_eval_rows` come apart."""
        found = [
            RowSet(purpose="training", rows=self.train, indices=self.train_indices),
            *_bounded_sets("evaluation", self.evaluation, self.eval_indices, self.eval_candidates),
        ]
        if self.retention is not None:
            everything = range(len(self.retention.file))
            found += _bounded_sets("retention", self.retention, self.retention_indices, everything)
        return [each for each in found if each.indices]

    def digest(self) -> str:
        """Identify what a check of the rows depends on: files, processor, length."""
        processor = self.encoder.renderer.processor
        tokenizer = self.encoder.renderer.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        values: dict[str, Any] = {
            "version": CHECK_VERSION,
            "transformers": transformers.__version__,
            "files": [each.rows.file.sha256 for each in self.sets()],
            "num_rows": [len(each.indices) for each in self.sets()],
            "max_length": self.train.row_encoder.max_length,
            "on_long_rows": self.train.row_encoder.on_long_rows,
            "template": processor.chat_template,
            "tokenizer": repr(tokenizer) if backend is None else backend.to_str(),
            "processor": repr(processor) if processor is not tokenizer else None,
        }
        return hashlib.sha256(canonical_json(values)).hexdigest()


def open_rows(job: TrainingJob) -> TrainingRows:
    """Open a job's files and divide their rows.

    A model whose processor cannot be loaded is `ModelUnavailable`, a file that cannot be read or
    holds no row `InvalidDataset`.
    """
    training = job.training
    encoder = ChatEncoder(load_processor(job.model))

    def opened(path: Path, name: str | None) -> EncodedRows:
        return EncodedRows(
            RowFile(path, name=name),
            encoder,
            max_length=training.max_length,
            on_long_rows=training.on_long_rows,
        )

    train = opened(job.dataset, job.dataset_name)
    train_indices: Sequence[int] = range(len(train.file))
    candidates: Sequence[int] = ()
    evaluation, retention = train, None
    if job.eval_dataset is not None:
        evaluation = opened(job.eval_dataset, job.eval_dataset_name)
        candidates = range(len(evaluation.file))
    elif job.eval_fraction > 0:
        train_indices, candidates = split_rows(
            len(train.file), eval_fraction=job.eval_fraction, seed=training.seed
        )
    if job.retention_dataset is not None:
        retention = opened(job.retention_dataset, job.retention_dataset_name)
    retained: Sequence[int] = () if retention is None else range(len(retention.file))
    bound = training.max_eval_rows
    return TrainingRows(
        encoder=encoder,
        train=train,
        train_indices=train_indices,
        evaluation=evaluation,
        eval_indices=choose_rows(candidates, at_most=bound, seed=training.seed),
        eval_candidates=candidates,
        retention=retention,
        retention_indices=choose_rows(retained, at_most=bound, seed=training.seed),
    )


def _bounded_sets(
    purpose: str, rows: EncodedRows, chosen: Sequence[int], candidates: Sequence[int]
) -> list[RowSet]:
    aside = array("q")
    if len(chosen) < len(candidates):
        kept = set(chosen)
        aside.extend(index for index in candidates if index not in kept)
    return [
        RowSet(purpose=purpose, rows=rows, indices=chosen),
        RowSet(purpose=purpose, rows=rows, indices=aside, used=False),
    ]
