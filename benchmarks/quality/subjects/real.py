"""Subject 4: SmolLM2-135M-Instruct, pretrained by others, learns what Python's library says.

`make real` converts the model; see `benchmarks.real`. A run takes minutes on two cores, so that a
sweep is for larger machines, and runs only where it is asked for: `--subject real`.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Final

import torch

from benchmarks.quality.subject import Subject
from benchmarks.quality.subjects.text import CORPUS
from benchmarks.real.convert import FOLDER
from benchmarks.real.library import chat, load_rows
from grit_core.config import ModalityConfig, ModelGRITConfig
from grit_core.data.encoder import ChatEncoder, EncodedRow
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import no_images, parse_record

NUM_TRAIN: Final = 600
NUM_HELD_OUT: Final = 64
NUM_RETENTION: Final = 32
WIDTH: Final = 64
"""Tokens of a row of documentation."""
RANK: Final = 8
TARGETS: Final = (2.88, 2.80, 2.79)
"""Of one run of AdamW at 0.001 with seed 1000, at 40, 65 and 90 % of its steps. The other subjects'
come from a grid of rates and two seeds: run `benchmarks.quality.pilot real` before any sweep."""


@cache
def encoder(folder: Path) -> ChatEncoder:
    """The encoder of training, with the model's own tokenizer and template."""
    return ChatEncoder(load_processor(folder))


def encode_rows(folder: Path, rows: Sequence[tuple[str, str]]) -> list[EncodedRow]:
    """Encode questions and answers as training does."""
    records = [
        parse_record({"messages": chat(*row)}, line=line, resolve_image=no_images)
        for line, row in enumerate(rows, start=1)
    ]
    return [encoded for record in records for encoded in encoder(folder).encode(record)]


def encode_prose(folder: Path, text: str, *, count: int) -> list[EncodedRow]:
    """Cut plain text into rows of WIDTH tokens, each of them a label; the first `count`."""
    tokenizer = encoder(folder).renderer.tokenizer
    # Long enough for the rows; the tokenizer warns of texts beyond the model's context.
    ids = torch.tensor(tokenizer(text[: count * WIDTH * 8], add_special_tokens=False).input_ids)
    rows = ids[: count * WIDTH].view(count, WIDTH)
    return [EncodedRow(input_ids=row, labels=row.clone(), features={}) for row in rows]


def configuration() -> ModelGRITConfig:
    """Rank 8 on queries and values."""
    return ModelGRITConfig(
        model_type="llama",
        text=ModalityConfig(
            layer_patterns=["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"],
            rank=RANK,
            alpha=2 * RANK,
            dropout=0.0,
            enable_projection=False,
            fisher_approximation="kfac",
        ),
    )


def subject(folder: Path = FOLDER) -> Subject:
    """Load the converted model and encode the rows.

    Raises:
        FileNotFoundError: It has not been converted.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; run `make real` first.")
    base = load_base_model(folder)
    rows = load_rows(num_train=NUM_TRAIN, num_held_out=2 * NUM_HELD_OUT)
    held_out = encode_rows(folder, rows.held_out)
    prose = (CORPUS / "documentation.txt").read_text(encoding="utf-8")
    return Subject(
        name="real",
        title="SmolLM2-135M-Instruct, to Python's library documentation",
        base_model=lambda: deepcopy(base),
        config=configuration(),
        train_rows=encode_rows(folder, rows.train),
        selection_rows=held_out[::2],
        report_rows=held_out[1::2],
        retention_rows=encode_prose(folder, prose, count=NUM_RETENTION),
        pad_token_id=encoder(folder).pad_token_id,
        batch_size=8,
        num_steps=32,
        eval_every=8,
        targets=TARGETS,
    )
