"""`python -m tests.chaos`: the whole harness; exit status 1 if a promise was broken.

A writer is killed at every call and at `--bytes-per-file` places of each file; `--kills` executions
of training jobs are killed; then `--submissions` are made while everything is killed. The seed
decides what is killed and when; the moments themselves are the machine's.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.chaos.submissions import run_submissions
from tests.chaos.training_kills import run_training_kills
from tests.run_guard import start_guard

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability"


def main() -> int:
    """Run what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bytes-per-file", type=int, default=20, help="0 leaves this part out")
    parser.add_argument("--kills", type=int, default=200, help="0 leaves this part out")
    parser.add_argument("--submissions", type=int, default=10_000, help="0 leaves this part out")
    parser.add_argument("--pause-seconds", type=float, default=0.2, help="of each of six callers")
    parser.add_argument("--calm-seconds", type=float, default=3.0, help="at most between faults")
    options = parser.parse_args()
    start_guard()
    good = True
    if options.bytes_per_file:
        good &= _report(
            "torn-checkpoints",
            lambda _folder: _tear(seed=options.seed, per_file=options.bytes_per_file),
        )
    if options.kills:
        good &= _report(
            "training-kills",
            lambda folder: run_training_kills(
                folder, kills=options.kills, seed=options.seed
            ).to_json(),
        )
    if options.submissions:
        good &= _report(
            "submissions",
            lambda folder: run_submissions(
                folder,
                count=options.submissions,
                seed=options.seed,
                trained_share=0.01,
                pause_seconds=options.pause_seconds,
                calm_seconds=options.calm_seconds,
            ).to_json(),
        )
    return 0 if good else 1


def _tear(*, seed: int, per_file: int) -> dict[str, Any]:
    # In a process of its own, because it forks.
    command = [sys.executable, "-m", "tests.chaos.torn_checkpoints"]
    command += [f"--seed={seed}", f"--bytes-per-file={per_file}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    subjects: dict[str, dict[str, Any]] = json.loads(done.stdout)
    found = [each for outcome in subjects.values() for each in outcome.pop("violations")]
    return {"seed": seed, "kills": subjects, "violations": found}


def _report(name: str, run: Callable[[Path], dict[str, Any]]) -> bool:
    folder = Path(tempfile.mkdtemp(prefix=f"grit-{name}-"))
    outcome = run(folder)
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "system": platform.system()}
    document = {"at": datetime.now(UTC).date().isoformat(), "machine": machine, **outcome}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(outcome, indent=2))
    bad = outcome["violations"] or outcome.get("differing")
    print(f"{name}: {'BROKEN; logs in ' + str(folder) if bad else 'every promise kept'}")
    return not bad


if __name__ == "__main__":
    sys.exit(main())
