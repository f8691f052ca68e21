"""What a step rule costs beside AdamW: SmolVLM-256M's shape, rank 16, all attention projections.

    python -m benchmarks.quality.step_time     # benchmarks/results/quality/step_time.json

Forward and backward of such a model take seconds, in which a rule's milliseconds drown. So its
parts are timed alone, in turns with AdamW's: the optimizer's step, an observed step (every tenth)
and a reprojection (every twentieth). The capture's part of forward and backward is the difference
of interleaved passes. The sum, spread over the steps, is set against a whole AdamW step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel

from benchmarks.measure import write_result
from benchmarks.quality.subject import num_label_tokens
from benchmarks.smolvlm_shape import write_model, write_rows
from benchmarks.training_step import configuration
from grit_core.curvature.capture import LayerSums
from grit_core.data.collate import Batch, collate
from grit_core.data.encoder import ChatEncoder
from grit_core.data.rows import EncodedRows
from grit_core.loss import label_loss_sum
from grit_core.models.inventory import inventory_of
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.models.vlm_adapter import build_capture, build_optimizer, inject_lora
from grit_core.optimizer import GRITOptimizer
from grit_core.plan import plan_adaptation
from grit_core.row_file import RowFile

RULES: Final = ("ekfac", "kfac", "gauge")
REPEATS: Final = 30
PASSES: Final = 7
FISHER_FREQ: Final = 10
PROJECTION_FREQ: Final = 20


def load(folder: Path, rows: Path) -> tuple[PeftModel, Any, Batch]:
    """The adapted model, what it was planned from, and one batch."""
    config = configuration(vision=False)
    base = load_base_model(str(folder), dtype="float32")
    plan = plan_adaptation(config, inventory_of(base))
    model = inject_lora(base, plan)
    encoder = ChatEncoder(load_processor(str(folder)))
    row = EncodedRows(RowFile(rows), encoder, max_length=2048).row(0)
    return model, (config, plan), collate(row, pad_token_id=encoder.pad_token_id)


def seconds_of(work: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def passes(model: PeftModel, planned: Any, batch: Batch) -> tuple[list[float], list[float], Any]:
    """Forward and backward without and with observation, in turns; and the last sums."""
    capture = build_capture(model, planned[1])
    num_tokens = num_label_tokens(batch)
    plain: list[float] = []
    observed: list[float] = []
    sums: dict[str, LayerSums] = {}

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        (label_loss_sum(model, batch) / num_tokens).backward()

    def with_observation() -> None:
        with capture.observing(gradient_scale=num_tokens, num_label_tokens=num_tokens) as found:
            forward_backward()
        sums.update(found)

    forward_backward()
    for index in range(PASSES):
        arms = [(plain, forward_backward), (observed, with_observation)]
        for times, work in arms if index % 2 == 0 else arms[::-1]:
            times.append(seconds_of(work))
    return plain, observed, sums


@torch.no_grad()
def optimizer_parts(
    model: PeftModel, planned: Any, sums: dict[str, LayerSums], rule: str, adamw: torch.optim.AdamW
) -> dict[str, float]:
    """Medians of a rule's step, observation and reprojection, and of AdamW's step in turns."""
    config, plan = planned
    config.step_rule = rule
    options = {"lr": 1e-9, "weight_decay": 0.0}
    optimizer: GRITOptimizer = build_optimizer(model, plan, config, total_steps=10**9, **options)
    optimizer.projection = type(optimizer.projection)(update_freq=10**9)
    optimizer.observe(sums)
    ours, theirs = [], []
    for _ in range(REPEATS):
        theirs.append(seconds_of(adamw.step))
        ours.append(seconds_of(optimizer.step))
    observations = [seconds_of(lambda: optimizer.observe(sums)) for _ in range(REPEATS // 3)]
    reprojections = [seconds_of(optimizer._reproject) for _ in range(REPEATS // 3)]  # noqa: SLF001 - timed alone
    return {
        "step": statistics.median(ours),
        "adamw_step": statistics.median(theirs),
        "observe": statistics.median(observations),
        "reproject": statistics.median(reprojections),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model_folder = write_model(Path(folder) / "model")
        rows = write_rows(Path(folder) / "rows.jsonl", num_rows=1, num_words=100)
        model, planned, batch = load(model_folder, rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-2)
    plain, observed, sums = passes(model, planned, batch)
    pass_seconds = statistics.median(plain)
    capture_seconds = max(
        0.0, statistics.median(b - a for a, b in zip(plain, observed, strict=True))
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-9, weight_decay=0.0)
    result: dict[str, Any] = {
        "threads": options.threads,
        "forward_backward_seconds": pass_seconds,
        "capture_seconds": capture_seconds,
        "rules": {},
    }
    for rule in RULES:
        parts = optimizer_parts(model, planned, sums, rule, adamw)
        extra = parts["step"] - parts["adamw_step"]
        extra += (capture_seconds + parts["observe"]) / FISHER_FREQ
        projected = extra + parts["reproject"] / PROJECTION_FREQ
        whole = pass_seconds + parts["adamw_step"]
        ratio, ratio_projected = 1 + extra / whole, 1 + projected / whole
        result["rules"][rule] = parts | {"ratio": ratio, "ratio_projected": ratio_projected}
        print(f"{rule}: {ratio:.4f} of AdamW's step, reprojected {ratio_projected:.4f}; {parts}")
    write_result("quality/step_time", result)


if __name__ == "__main__":
    main()
