"""What the plan says of memory, against what a step takes on a device, counted byte by byte."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grit_core.config.training import TrainingConfig
from grit_core.estimate import estimate
from grit_core.models.inventory import build_inventory
from grit_core.plan import plan_adaptation
from grit_core.training_run import TrainingRun
from tests.accelerator import Accelerator
from tests.grit_core.training_jobs import CAUSAL_CONFIG, VLM_CONFIG, tiny_job
from tests.tiny_models import (
    CHATML_TEMPLATE,
    byte_tokenizer,
    tiny_chat_rows,
    tiny_vlm_folder,
    write_jsonl,
)


def causal_folder(folder: Path, *, hidden: int, layers: int) -> Path:
    """A Llama in whose blocks the attention scores are a small part."""
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("shape", "precision", "checkpointing"),
    [
        ("vlm", "float32", "off"),
        ("vlm", "bfloat16", "reentrant"),
        ("wide", "float32", "reentrant"),
        ("deep", "bfloat16", "off"),
    ],
)
def test_the_estimate_is_near_what_a_step_takes(
    tmp_path: Path, accelerator: Accelerator, shape: str, precision: str, checkpointing: str
) -> None:
    if shape == "vlm":
        folder, config = tiny_vlm_folder(tmp_path), VLM_CONFIG
    else:
        hidden, layers = {"wide": (256, 2), "deep": (128, 6)}[shape]
        folder = causal_folder(tmp_path / shape, hidden=hidden, layers=layers)
        config = CAUSAL_CONFIG
    rows: list[dict[str, Any]] = tiny_chat_rows(4, images=shape == "vlm")
    for row in rows:
        row["messages"][-1]["content"] = "0123456789" * 8
    inventory = build_inventory(folder)
    job = dataclasses.replace(
        tiny_job(tmp_path, text_only=shape != "vlm"),
        model=str(folder),
        config=config,
        plan=plan_adaptation(config, inventory),
        training=TrainingConfig(
            max_steps=1,
            batch_size=4,
            precision=precision,
            gradient_checkpointing=checkpointing,
            checkpoint_every_steps=1,
            eval_every_steps=1,
        ),
        dataset=write_jsonl(tmp_path / "long.jsonl", rows),
        device="sim",
        precision=precision,
    )
    before = accelerator.measure()
    accelerator.peak_bytes = before
    run = TrainingRun(job, num_threads=1)
    step = run.rows_of(0)
    run.forward_backward(step)
    run.unscaled_grad_norm()
    run.optimizer_step(1e-3)
    taken = accelerator.peak_bytes - before
    found = estimate(
        job.plan,
        inventory,
        job.training,
        num_rows=4,
        tokens_per_row=max(batch.labels.shape[1] for batch in step.batches),
    )
    run.close()
    del run
    gc.collect()
    assert 0.7 * taken <= found.memory_bytes <= 1.5 * taken, (found.parts, taken)
