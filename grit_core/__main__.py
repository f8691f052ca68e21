"""The library's own command line, for runs without the service.

    python -m grit_core train job.json --dataset rows.jsonl --output DIR [--resume]
    torchrun --nproc-per-node 2 -m grit_core train ...
    python -m grit_core compress --model MODEL --adapter DIR --dataset rows.jsonl --output DIR
    python -m grit_core plan job.json [--dataset rows.jsonl]
    python -m grit_core inventory MODEL
    python -m grit_core probe MODEL

`job.json` is the body of `POST /jobs`; its `model` may be a folder, its datasets are those of the
options. Exit status: 0 done, 1 failed, 2 refused input, 130 interrupted (a checkpoint is saved).
"""

import argparse
import dataclasses
import json
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from grit_core.compression_job import (
    DEFAULT_MAX_KL,
    DEFAULT_NUM_ROWS,
    CompressionJob,
    validate,
)
from grit_core.config.devices import (
    DEFAULT_STRATEGY,
    DeviceChoice,
    available_devices,
    choose_device,
    has_native_bfloat16,
)
from grit_core.dataset_notes import local_notes
from grit_core.errors import (
    DeviceUnavailable,
    Fault,
    GritError,
    InvalidConfig,
    InvalidDataset,
    ModelUnavailable,
    PlanMismatch,
)
from grit_core.events import (
    AdapterSaved,
    CheckpointSaved,
    Compacted,
    Evaluated,
    RetentionEvaluated,
    RowsChecked,
    StepCompleted,
    StepSkipped,
    TrainingEvent,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
    Warned,
    event_to_json,
)
from grit_core.image_use import find_images, image_faults, image_warnings
from grit_core.inventory import ModelInventory
from grit_core.job_spec import AUTO, ResolvedJob, requested_precision, resolve_job
from grit_core.json_text import InvalidJson, decode
from grit_core.models.inventory import build_inventory
from grit_core.row_file import RowFile
from grit_core.training_job import TrainingJob

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
ASSUMED_ROWS = 1000
"""Rows for which `plan` counts steps when no dataset is given."""

DEFAULT_PROCESS_TIMEOUT_SECONDS = 600.0
"""They may load the model from disks of different speed."""
MAX_PROCESS_TIMEOUT_SECONDS = 86_400

TRAIN_NOTES = """The settings are those of the file: training.gradient_checkpointing
(off, non_reentrant, reentrant) trades time for memory, training.precision chooses float32,
bfloat16 or float16. With several cards or machines start it by torchrun: the processes share the
rows of every step, so that batch size and number of steps stay what the file says."""
"""What the options do not say."""

LINES: dict[type[TrainingEvent], str] = {
    RowsChecked: "Checked {done} of {total} rows.",
    TrainingStarted: "Training on {device} in {precision}: {num_rows} rows, {num_eval_rows} to"
    " evaluate on; {start_step} of {total_steps} steps are done.",
    StepCompleted: "step {step}/{total_steps}  loss {train_loss:.4f}  rate {learning_rate:.2e}"
    "  {tokens_per_second:.0f} tokens/s",
    Evaluated: "step {step}  evaluation loss {eval_loss:.4f}",
    RetentionEvaluated: "step {step}  retention loss {loss:.4f}, {when} training",
    CheckpointSaved: "step {step}  checkpoint {folder}",
    StepSkipped: "step {step}  skipped: {reason}",
    Warned: "warning ({code}): {message}",
    Compacted: "Cut from {parameters_before:,} to {parameters_after:,} parameters: divergence"
    " {measured_kl:.2e} nats for a label token (predicted {predicted_kl:.2e}, limit {max_kl:g}).",
    AdapterSaved: "Adapter in {folder} (sha256 {sha256}).",
    TrainingStopped: "Stopped after step {step}: {reason} Continue with --resume.",
    TrainingFinished: "Finished after step {step}.",
}
"""What people read of an event."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (InvalidConfig, InvalidDataset, ModelUnavailable, DeviceUnavailable) as error:
        _complain(str(error))
        return REFUSED
    except GritError as error:
        _complain(f"{type(error).__name__}: {error}")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grit_core", description="GRIT without a service."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    train = commands.add_parser(
        "train", help="fine-tune, and write an adapter folder", epilog=TRAIN_NOTES
    )
    train.add_argument("job", type=Path, help="the body of POST /jobs as a JSON file")
    train.add_argument("--dataset", type=Path, required=True, help="chat rows (JSONL)")
    train.add_argument("--eval-dataset", type=Path, help="chat rows to evaluate on")
    train.add_argument(
        "--retention-dataset",
        type=Path,
        help="chat rows of what the model can do already: their loss before and after training"
        " tells what it forgot; never trained on",
    )
    train.add_argument("--output", type=Path, required=True, help="for checkpoints/ and adapter/")
    train.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    train.add_argument("--threads", type=int, help="CPU threads (default: torch's own number)")
    train.add_argument(
        "--process-timeout",
        type=_seconds,
        default=DEFAULT_PROCESS_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="under torchrun: how long to wait for the other processes (default: %(default)g)",
    )
    train.add_argument("--json", action="store_true", help="one JSON event a line")
    train.set_defaults(run=_train)
    _add_compress(commands)
    plan = commands.add_parser("plan", help="print which layers would adapt, as JSON")
    plan.add_argument("job", type=Path, help="the body of POST /jobs as a JSON file")
    plan.add_argument("--dataset", type=Path, help="chat rows (JSONL), to count the steps")
    plan.set_defaults(run=_plan)
    inventory = commands.add_parser("inventory", help="print a model's layers, as JSON")
    inventory.add_argument("model", help="a folder or hub id")
    inventory.set_defaults(run=_inventory)
    probe = commands.add_parser(
        "probe", help="try a model out as its registration does: weights, processor, default layers"
    )
    probe.add_argument("model", help="a folder or hub id")
    probe.set_defaults(run=_probe)
    return parser


def _add_compress(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compress = commands.add_parser(
        "compress", help="cut the weakest directions of a LoRA adapter, whatever trained it"
    )
    compress.add_argument("--model", required=True, help="the base model: a folder or hub id")
    compress.add_argument("--model-name", help="what the adapter calls it (default: --model)")
    compress.add_argument("--adapter", type=Path, required=True, help="a PEFT folder")
    compress.add_argument(
        "--dataset", type=Path, required=True, help="chat rows like those it was trained on (JSONL)"
    )
    compress.add_argument("--eval-dataset", type=Path, help="chat rows to evaluate on")
    compress.add_argument("--output", type=Path, required=True, help="for adapter/")
    compress.add_argument(
        "--max-kl",
        type=float,
        default=DEFAULT_MAX_KL,
        metavar="NATS",
        help="most divergence from the whole adapter, for a label token (default: %(default)g)",
    )
    compress.add_argument(
        "--num-rows",
        type=int,
        default=DEFAULT_NUM_ROWS,
        help="most rows that the divergence is measured on (default: %(default)d)",
    )
    compress.add_argument("--batch-size", type=int, default=8, help="rows of an evaluation pass")
    compress.add_argument("--max-length", type=int, default=2048, help="tokens of a row")
    compress.add_argument("--device", default=DEFAULT_STRATEGY, help="a strategy or a device")
    compress.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="number format of the base model (default: what the device trains in)",
    )
    compress.add_argument("--seed", type=int, default=0, help="chooses the rows")
    compress.add_argument("--threads", type=int, help="CPU threads (default: torch's own number)")
    compress.add_argument("--json", action="store_true", help="one JSON event a line")
    compress.set_defaults(run=_compress)


def _compress(options: argparse.Namespace) -> int:
    job = _compression_job(options)
    faults = validate(job)
    if faults:
        raise InvalidConfig(faults)
    # Loaded here, so that bad input is refused at once.
    from transformers.utils import logging

    from grit_core.compression import compress  # noqa: PLC0415 - as above

    logging.disable_progress_bar()
    stop = _Stop()
    for event in compress(job, should_stop=stop.asked):
        line = json.dumps(event_to_json(event)) if options.json else _compression_line(event)
        if line:
            _say(line)
    return INTERRUPTED if stop.asked() else 0


def _compression_job(options: argparse.Namespace) -> CompressionJob:
    choice = _choose_device(options.device)
    return CompressionJob(
        model=options.model,
        model_name=options.model_name,
        adapter=options.adapter,
        dataset=options.dataset,
        eval_dataset=options.eval_dataset,
        work_dir=options.output,
        max_kl=options.max_kl,
        num_rows=options.num_rows,
        batch_size=options.batch_size,
        max_length=options.max_length,
        device=choice.device,
        precision=options.precision or AUTO,
        seed=options.seed,
        num_threads=options.threads,
    )


def _train(options: argparse.Namespace) -> int:
    # Loaded here, so that bad input is refused at once.
    from transformers.utils import logging

    from grit_core.checkpoints import latest_checkpoint  # noqa: PLC0415 - as above
    from grit_core.processes import Processes, joined  # noqa: PLC0415 - as above
    from grit_core.training import train  # noqa: PLC0415 - as above

    logging.disable_progress_bar()
    job = _training_job(options)
    nothing: tuple[Path | None, list[str]] = (None, [])
    found = latest_checkpoint(options.output / "checkpoints") if options.resume else nothing
    resume_from, passed_over = found
    stop = _Stop()
    with joined(job.device, timeout_seconds=options.process_timeout) as device:
        job = dataclasses.replace(job, device=device)
        if Processes.current().leads:
            for reason in passed_over:
                _complain(f"A checkpoint is passed over: {reason}")
            for warning in job.plan.warnings:
                _complain(f"Warning: {warning}")
        for event in train(job, should_stop=stop.asked, resume_from=resume_from):
            line = json.dumps(event_to_json(event)) if options.json else _line(event)
            if line:
                _say(line)
    return INTERRUPTED if stop.asked() else 0


def _plan(options: argparse.Namespace) -> int:
    spec = _read_spec(options.job)
    rows = None if options.dataset is None else RowFile(options.dataset)
    choice, resolved = _resolve(spec, _inventory_of(spec), rows)
    answer = {
        **resolved.plan.to_json(),
        "config": resolved.config_json(),
        "training": resolved.training_json(),
        "device": choice.device,
        "device_reason": choice.device_reason,
        "num_rows": resolved.num_rows,
        "estimate": resolved.estimate_json(),
    }
    _say(json.dumps(answer, indent=2))
    return 0


def _inventory(options: argparse.Namespace) -> int:
    _say(json.dumps(build_inventory(options.model).to_json(), indent=2))
    return 0


def _probe(options: argparse.Namespace) -> int:
    # Loaded here, so that the other commands do not wait for it.
    from transformers.utils import logging

    from grit_core.models.probe import probe_model  # noqa: PLC0415 - as above

    logging.disable_progress_bar()
    found = probe_model(options.model).to_json()
    shown = ("model_type", "architecture", "total_parameters", "probe", "chat_format", "hash")
    _say(json.dumps({name: found[name] for name in shown}, indent=2))
    return 0


def _training_job(options: argparse.Namespace) -> TrainingJob:
    spec = _read_spec(options.job)
    # The datasets that the body names are those of a service; here the options name them.
    spec = {**spec, "eval_dataset": None if options.eval_dataset is None else "given"}
    inventory = _inventory_of(spec)
    choice, resolved = _resolve(spec, inventory, RowFile(options.dataset))
    expected = spec.get("plan_hash")
    if expected not in {None, resolved.plan.plan_hash}:
        detail = (
            f"plan_hash is {expected!r} and the plan's is {resolved.plan.plan_hash}; plan again."
        )
        raise PlanMismatch([_fault("/plan_hash", detail)])
    return TrainingJob(
        model=spec["model"],
        plan=resolved.plan,
        config=resolved.config,
        training=resolved.training,
        dataset=options.dataset,
        eval_dataset=options.eval_dataset,
        eval_fraction=resolved.eval_fraction,
        retention_dataset=options.retention_dataset,
        device=choice.device,
        precision=requested_precision(spec),
        work_dir=options.output,
        num_threads=options.threads,
    )


def _resolve(
    spec: Mapping[str, Any], inventory: ModelInventory, rows: RowFile | None
) -> tuple[DeviceChoice, ResolvedJob]:
    """Plan for the rows of a file; without one, for an assumed number of rows.

    Raises:
        InvalidConfig: The rows have images that the model cannot read; or what `resolve_job` finds.
        AssertionError: Never: model and dataset are known.
    """
    choice = _choose_device(spec.get("device", DEFAULT_STRATEGY))
    num_rows = ASSUMED_ROWS if rows is None else len(rows)
    resolved = resolve_job(
        spec,
        inventory,
        num_rows=num_rows,
        device=choice.device,
        native_bfloat16=has_native_bfloat16(choice.device),
    )
    if resolved is None:
        raise AssertionError("Model and dataset are known, so there is a plan or an error.")
    num_images = None if rows is None else find_images(rows)
    faults = image_faults(inventory, {"--dataset": num_images})
    if faults:
        raise InvalidConfig(faults)
    warnings = [*resolved.plan.warnings, *image_warnings(resolved.plan, num_images=num_images)]
    warnings += [] if rows is None else local_notes(rows)
    plan = dataclasses.replace(resolved.plan, warnings=tuple(warnings))
    return choice, dataclasses.replace(resolved, plan=plan)


def _choose_device(wanted: str) -> DeviceChoice:
    return choose_device(wanted, available_devices(), native_bfloat16=has_native_bfloat16)


def _read_spec(path: Path) -> dict[str, Any]:
    """Return the request that a file holds.

    Raises:
        InvalidConfig: It cannot be read, or is no JSON object.
    """
    try:
        spec = decode(path.read_bytes())
    except OSError as error:
        raise InvalidConfig([_fault("", f"{path} cannot be read: {error.strerror}.")]) from error
    except InvalidJson as error:
        detail = f"{path} is not strict JSON: {error.detail}"
        raise InvalidConfig([_fault(error.pointer, detail)]) from error
    if not isinstance(spec, dict):
        raise InvalidConfig([_fault("", f"{path} holds no JSON object.")])
    return spec


def _inventory_of(spec: Mapping[str, Any]) -> ModelInventory:
    """Read the layers of the request's model.

    Raises:
        InvalidConfig: There is no such model; what else is wrong with the request is said too.
    """
    model = spec.get("model")
    if isinstance(model, str) and model:
        try:
            return build_inventory(model)
        except ModelUnavailable as error:
            faults = [_fault("/model", str(error))]
    else:
        faults = [_fault("/model", "model is missing; give a folder or a hub id.")]
    try:
        resolve_job(spec, None, num_rows=None, device="cpu")
    except InvalidConfig as error:
        faults.extend(error.faults)
    raise InvalidConfig(faults)


def _seconds(text: str) -> float:
    """Read a positive number of seconds.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < MAX_PROCESS_TIMEOUT_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds above 0 and below {MAX_PROCESS_TIMEOUT_SECONDS}"
        )
    return seconds


def _fault(pointer: str, detail: str) -> Fault:
    return Fault(pointer=pointer, code="invalid", detail=detail)


class _Stop:
    """Turns the first interrupt into a stop at the next step boundary; the second ends at once."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def asked(self) -> bool:
        """Tell whether an interrupt has come."""
        return self._asked

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)


def _line(event: TrainingEvent) -> str | None:
    """One line of progress for people, or nothing."""
    template = LINES.get(type(event))
    return None if template is None else template.format(**dataclasses.asdict(event))


def _compression_line(event: TrainingEvent) -> str | None:
    """The same, where steps and checkpoints do not come up."""
    if isinstance(event, TrainingStarted):
        return (
            f"Compressing on {event.device} in {event.precision}: {event.num_rows} rows,"
            f" {event.num_eval_rows} to evaluate on."
        )
    if isinstance(event, TrainingStopped):
        return f"{event.reason} Nothing was written."
    if isinstance(event, TrainingFinished):
        losses = event.compaction or {}
        before, after = losses.get("eval_loss_before"), losses.get("eval_loss_after")
        if before is None or after is None:
            return "Finished; there were no rows to evaluate on."
        return f"Finished; evaluation loss {before:.4f} before, {after:.4f} after."
    return _line(event)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
