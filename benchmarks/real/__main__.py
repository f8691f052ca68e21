"""Train SmolLM2-135M-Instruct through the service, and with plain PEFT beside it.

    make real

Registers the model, uploads rows, trains one job with our optimizer and one with AdamW, asks about
names that no row had before and after, and prints the losses beside those of plain PEFT.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.measure import write_result
from benchmarks.real.convert import BUILD, FOLDER, MODEL
from benchmarks.real.library import Rows, load_rows, write_jsonl
from benchmarks.real.plain_peft import PlainModel, Settings, train
from benchmarks.real.report import Arm, find_faults, render_table
from grit_client.client import GritClient

NUM_TRAIN: Final = 600
NUM_HELD_OUT: Final = 64
NUM_SHOWN: Final = 3
WAIT_SECONDS: Final = 30.0
OPTIMIZERS: Final = {"adamw": "service, AdamW", "grit": "service, GRIT"}


def build_spec(dataset: str, optimizer: str, settings: Settings) -> dict[str, Any]:
    """Return a job's request."""
    patterns = [f"model.layers.*.self_attn.{target}" for target in settings.targets]
    return {
        "model": MODEL,
        "dataset": dataset,
        "eval_fraction": 0,
        "config": {
            "model_name": MODEL,
            "model_type": "llama",
            "text": {
                "layer_patterns": patterns,
                "rank": settings.rank,
                "alpha": settings.alpha,
                "dropout": 0.0,
            },
        },
        "training": {
            "epochs": 100,
            "max_steps": settings.steps,
            "learning_rate": settings.learning_rate,
            "lr_schedule": "constant",
            "warmup_ratio": 0,
            "batch_size": settings.rows_per_step,
            "optimizer": optimizer,
            "precision": "float32",
            "seed": settings.seed,
        },
        "name": f"real-{optimizer}",
    }


@contextmanager
def running_service(home: Path) -> Iterator[GritClient]:
    """Run the embedded service while the block runs."""
    grit = str(Path(sys.executable).with_name("grit"))
    subprocess.run([grit, "up", "--detach", "--home", str(home)], check=True)
    try:
        with GritClient(home=home) as client:
            yield client
    finally:
        subprocess.run([grit, "down", "--home", str(home)], check=True)


def train_by_service(client: GritClient, dataset: str, optimizer: str, settings: Settings) -> Any:
    """Run a job to its end.

    Raises:
        RuntimeError: It has not succeeded.
    """
    job = client.create_job(build_spec(dataset, optimizer, settings))
    while job["status"] not in {"succeeded", "failed", "cancelled"}:
        job = client.get_job(job["id"], wait=WAIT_SECONDS)
    if job["status"] != "succeeded":
        raise RuntimeError(f"job {job['id']} {job['status']}: {job.get('error')}")
    return job


def answers(client: GritClient, rows: Rows, **target: str) -> list[str]:
    """Return the answers to the first questions that were held out."""
    return [
        client.infer(question, max_new_tokens=40, **target)["output"].strip()
        for question, _ in rows.held_out[:NUM_SHOWN]
    ]


def compare(rows: Rows, settings: Settings) -> tuple[float, dict[str, Arm], dict[str, list[str]]]:
    """Train by every way; return the base model's loss, the arms, and what each answered."""
    plain = PlainModel(FOLDER)
    base = plain.adapter_loss(None, rows.held_out)
    arms: dict[str, Arm] = {}
    upload, adapters = BUILD / "library.jsonl", BUILD / "adapters"
    write_jsonl(upload, rows.train)
    shutil.rmtree(adapters, ignore_errors=True)
    with running_service(BUILD / "home") as client:
        client.register_model(FOLDER, id=MODEL, wait_seconds=300)
        dataset = client.upload_dataset(upload)["id"]
        said = {"base model": answers(client, rows, model=MODEL)}
        for optimizer, name in OPTIMIZERS.items():
            job = train_by_service(client, dataset, optimizer, settings)
            series = client.metrics(job["id"])["series"]["train_loss"]
            folder = client.download_adapter(job["result"]["adapter"], adapters / optimizer)
            held_out = plain.adapter_loss(folder, rows.held_out)
            arms[optimizer] = Arm(name=name, losses=series, held_out=held_out)
            said[name] = answers(client, rows, job=job["id"])
    model, losses = train(plain, rows.train, settings)
    arms["peft"] = Arm(
        name="plain PEFT, AdamW", losses=losses, held_out=plain.loss(model, rows.held_out)
    )
    return base, arms, said


def print_answers(rows: Rows, said: Mapping[str, list[str]]) -> None:
    """Print what each way answers to questions that were held out."""
    for index, (question, documented) in enumerate(rows.held_out[:NUM_SHOWN]):
        print(f"\n{question}\n  {'documented':<15} {documented}")
        for name, texts in said.items():
            print(f"  {name:<15} {' '.join(texts[index].split())}")


def main() -> int:
    """Run what the command line asks for; 1 where the losses do not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(steps=options.steps)
    rows = load_rows(num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT)
    began = time.monotonic()
    base, arms, said = compare(rows, settings)
    print_answers(rows, said)
    print(f"\n{render_table(base, list(arms.values()))}\n")
    faults = find_faults(base, arms)
    seconds = time.monotonic() - began
    write_result(
        "real",
        {
            "model": MODEL,
            "rows": {"train": NUM_TRAIN, "held_out": NUM_HELD_OUT, "digest": rows.digest},
            "python": sys.version.split()[0],
            "settings": vars(settings),
            "base_held_out": base,
            "arms": {key: {**vars(arm), "losses": list(arm.losses)} for key, arm in arms.items()},
            "answers": said,
            "faults": faults,
            "seconds": seconds,
        },
    )
    for fault in faults:
        print(f"FAILED: {fault}.")
    print(f"That took {seconds:.0f} s.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
