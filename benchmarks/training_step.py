"""Our training step (GRIT on) against the HF Trainer with PEFT LoRA and AdamW, SmolVLM-256M shape.

Both arms adapt the same layers at the same rank and train on the same rows. Time: both live in one
process and take turns, step by step. Memory: each runs in a process of its own.

    python -m benchmarks.training_step            # writes benchmarks/results/training_step.json
"""

import argparse
import json
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.measure import interleave, paired_ratio, write_result
from benchmarks.smolvlm_shape import write_model, write_rows
from grit_core.config import ModalityConfig, ModelGRITConfig
from grit_core.config.training import TrainingConfig
from grit_core.data.collate import collate
from grit_core.data.encoder import ChatEncoder
from grit_core.data.rows import EncodedRows
from grit_core.events import StepCompleted
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.plan import AdaptationPlan, plan_adaptation
from grit_core.row_file import RowFile
from grit_core.training import train
from grit_core.training_job import TrainingJob

RANK = 16
ATTENTION = "self_attn.*_proj"
NUM_STEPS = 60


def configuration(*, vision: bool) -> ModelGRITConfig:
    """All attention projections of the text model, and of the vision tower when asked."""
    return ModelGRITConfig(
        vision=ModalityConfig(
            layer_patterns=[f"model.vision_model.encoder.layers.*.{ATTENTION}"],
            fisher_approximation="kfac",
        )
        if vision
        else None,
        text=ModalityConfig(
            layer_patterns=[f"model.text_model.layers.*.{ATTENTION}"], fisher_approximation="kfac"
        ),
        global_rank=RANK,
        global_dropout=0.0,
    )


class Ours:
    """One optimizer step of `grit_core.training.train` at a time."""

    def __init__(self, model: Path, rows: Path, plan: AdaptationPlan, *, threads: int) -> None:
        self.config = configuration(vision=any(x.modality == "vision" for x in plan.layers))
        training = TrainingConfig(
            max_steps=NUM_STEPS,
            epochs=1000,
            batch_size=1,
            checkpoint_every_steps=10_000,
            eval_every_steps=10_000,
            learning_rate=1e-4,
            precision="float32",
        )
        self.folder = tempfile.TemporaryDirectory()
        job = TrainingJob(
            model=str(model),
            plan=plan,
            config=self.config,
            training=training,
            dataset=rows,
            work_dir=Path(self.folder.name),
            num_threads=threads,
        )
        self.events = train(job)

    def step(self) -> float:
        """Run until a step is completed; return its seconds."""
        started = time.perf_counter()
        for event in self.events:
            if isinstance(event, StepCompleted):
                return time.perf_counter() - started
        raise RuntimeError("training ended before the benchmark did")

    def close(self) -> None:
        """End training."""
        self.events.close()  # type: ignore[attr-defined]
        self.folder.cleanup()


class Turnstile(TrainerCallback):
    """Lets the HF Trainer take one step at a time."""

    def __init__(self) -> None:
        self.go: queue.Queue[bool] = queue.Queue()
        self.done: queue.Queue[float] = queue.Queue()
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for a turn."""
        if not self.go.get():
            control.should_training_stop = True
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step's seconds."""
        self.done.put(time.perf_counter() - self.started)


class Theirs:
    """One optimizer step of the HF Trainer at a time, in a thread of its own."""

    def __init__(self, model: Path, rows: Path, plan: AdaptationPlan) -> None:
        base = load_base_model(model, dtype="float32")
        names = sorted(layer.name for layer in plan.layers)
        adapted = get_peft_model(
            base, LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=names)
        )
        encoded = EncodedRows(RowFile(rows), ChatEncoder(load_processor(model)), max_length=2048)
        pad = encoded.encoder.pad_token_id
        data = [each for index in range(len(encoded.file)) for each in encoded.row(index)]

        def as_arguments(batch: list[Any]) -> dict[str, Any]:
            collated = collate(batch, pad_token_id=pad)
            return {**collated.inputs, "labels": collated.labels}

        self.folder = tempfile.TemporaryDirectory()
        options = TrainingArguments(
            output_dir=self.folder.name,
            max_steps=NUM_STEPS,
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            optim="adamw_torch",
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        self.turnstile = Turnstile()
        trainer = Trainer(
            model=adapted,
            args=options,
            train_dataset=data,
            data_collator=as_arguments,
            callbacks=[self.turnstile],
        )
        self.thread = threading.Thread(target=trainer.train, daemon=True)
        self.thread.start()

    def step(self) -> float:
        """Give the Trainer a turn; return the step's seconds."""
        self.turnstile.go.put(True)
        return self.turnstile.done.get(timeout=600)

    def close(self) -> None:
        """End training."""
        self.turnstile.go.put(False)
        self.thread.join(timeout=60)
        self.folder.cleanup()


def peak_bytes(arm: str, options: argparse.Namespace) -> int:
    """Peak resident memory of a process that runs one arm alone."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--arm", arm]
    command += ["--threads", str(options.threads), "--cache", str(options.cache)]
    if options.vision:
        command.append("--vision")
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak_bytes"])


def main() -> None:
    """Measure time and memory, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision", action="store_true", help="adapt the vision tower too")
    parser.add_argument("--cache", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--arm", choices=["ours", "theirs"], help="run one arm alone, for memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    model = write_model(options.cache.resolve() / "smolvlm-256m-shape")
    rows = write_rows(options.cache.resolve() / "rows.jsonl", num_rows=16, num_words=40)
    plan = plan_adaptation(configuration(vision=options.vision), build_inventory(model))
    makers: dict[str, Callable[[], Any]] = {
        "ours": lambda: Ours(model, rows, plan, threads=options.threads),
        "theirs": lambda: Theirs(model, rows, plan),
    }
    if options.arm:
        arm = makers[options.arm]()
        for _ in range(3):
            arm.step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        arm.close()
        print(json.dumps({"peak_bytes": peak}), flush=True)
        return
    memory = {name: peak_bytes(name, options) for name in makers}
    ours, theirs = makers["ours"](), makers["theirs"]()
    for _ in range(2):
        ours.step(), theirs.step()
    times = interleave(ours.step, theirs.step, num_pairs=options.pairs)
    result = {
        "what": "one optimizer step, batch 1, one 512-pixel image, rank 16, float32",
        "layers": len(plan.layers),
        "vision": options.vision,
        "threads": options.threads,
        "time": paired_ratio(*times),
        "peak_bytes": memory,
        "memory_ratio": memory["ours"] / memory["theirs"],
        "seconds": {"ours": times[0], "theirs": times[1]},
    }
    name = "training_step_vision" if options.vision else "training_step"
    print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=2))
    print(write_result(name, result))
    ours.close(), theirs.close()


if __name__ == "__main__":
    main()
