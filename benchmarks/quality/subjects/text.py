"""Subject 3: a small Llama pretrained here on Python's documentation is moved to Python's source.

Both texts ship with CPython 3.11 and are kept in `corpus/`, so that every machine has the same.
Tokens are bytes. Pretraining takes some minutes once; its weights are cached beside this file.

    python -m benchmarks.quality.subjects.text          # pretrain and tell the loss
"""

import hashlib
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.subject import Subject
from grit_core.config import ModalityConfig, ModelGRITConfig
from grit_core.data.encoder import EncodedRow

CORPUS: Final = Path(__file__).parent / "corpus"
CACHE: Final = Path(__file__).parent / ".cache"
WIDTH: Final = 128
"""Bytes of one row."""
NUM_TRAIN: Final = 1200
NUM_HELD_OUT: Final = 64
NUM_KEPT_BACK: Final = 80
"""Rows of the documentation that pretraining does not see."""
NUM_RETENTION: Final = 48
STEPS: Final = 1200
BATCH: Final = 16
PEAK_RATE: Final = 3e-3
RANK: Final = 8


def llama() -> LlamaForCausalLM:
    """Four layers, 0.8 M parameters, one token a byte."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=WIDTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def blocks(name: str) -> Tensor:
    """A corpus as rows of WIDTH bytes, shuffled once; int64 [rows, WIDTH]."""
    data = (CORPUS / name).read_bytes()
    whole = len(data) // WIDTH * WIDTH
    rows = torch.frombuffer(bytearray(data[:whole]), dtype=torch.uint8).long().view(-1, WIDTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def pretrain(steps: int = STEPS) -> LlamaForCausalLM:
    """Train on the documentation, its held-out rows left out; the same bytes on one machine."""
    rows = blocks("documentation.txt")[NUM_KEPT_BACK:]
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        share = min((step + 1) / 100, (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * share
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = next_byte_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def next_byte_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross entropy of every byte after the first, in nats."""
    logits = model(input_ids=rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def pretrained(steps: int = STEPS) -> LlamaForCausalLM:
    """Load the pretrained weights, or train them.

    Raises:
        RuntimeError: The cached weights are of another architecture.
    """
    recipe = repr((WIDTH, NUM_KEPT_BACK, steps, BATCH, PEAK_RATE)).encode()
    digest = hashlib.sha256(recipe + (CORPUS / "documentation.txt").read_bytes()).hexdigest()
    path = CACHE / f"text-{digest[:16]}.safetensors"
    model = llama()
    if not path.exists():
        model = pretrain(steps)
        CACHE.mkdir(exist_ok=True)
        tied = {
            name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
        }
        unfinished = path.with_suffix(".new")
        save_file({name: tensor.contiguous() for name, tensor in tied.items()}, unfinished)
        unfinished.replace(path)
    wrong = model.load_state_dict(load_file(path), strict=False)
    if wrong.unexpected_keys or wrong.missing_keys != ["lm_head.weight"]:
        raise RuntimeError(f"{path} holds another architecture; delete it to train anew.")
    model.tie_weights()
    return model.eval()


def rows_of(tokens: Tensor) -> list[EncodedRow]:
    """Every byte is a label."""
    return [EncodedRow(input_ids=row, labels=row.clone(), features={}) for row in tokens]


def configuration() -> ModelGRITConfig:
    """Rank 8 on all attention projections."""
    return ModelGRITConfig(
        model_type="llama",
        text=ModalityConfig(
            layer_patterns=["model.layers.*.self_attn.*_proj"],
            rank=RANK,
            alpha=2 * RANK,
            dropout=0.0,
            enable_projection=False,
            fisher_approximation="kfac",
        ),
    )


def subject(steps: int = STEPS) -> Subject:
    """Load the model, pretrained for so many steps if need be, and cut the rows."""
    base = pretrained(steps)
    source = blocks("source.txt")
    held_out: Sequence[EncodedRow] = rows_of(source[: 2 * NUM_HELD_OUT])
    return Subject(
        name="text",
        title="byte-level Llama, from Python's documentation to its source",
        base_model=lambda: deepcopy(base),
        config=configuration(),
        train_rows=rows_of(source[2 * NUM_HELD_OUT :][:NUM_TRAIN]),
        selection_rows=held_out[::2],
        report_rows=held_out[1::2],
        retention_rows=rows_of(blocks("documentation.txt")[:NUM_RETENTION]),
        pad_token_id=0,
        batch_size=8,
        num_steps=60,
        eval_every=10,
        targets=(1.65, 1.59, 1.56),
    )


if __name__ == "__main__":
    found = subject()
    model = found.base_model()
    print(f"documentation {found.loss(model, found.retention_rows):.3f}")
    print(f"source        {found.loss(model, found.report_rows):.3f}")
