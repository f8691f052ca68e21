"""`make fuzz`: 10,000 cases of each target, judged under the limits of the judge's own process.

`python -m tests.fuzz [--count N] [--seed S] [--out FILE]`. Each target runs in a process of its
own; when that dies, the case at which it did is counted as a crash and the rest goes on after it.
The figures go to `benchmarks/results/reliability/fuzz.json`.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Final

from api.intake.judge import Limits, limit_self
from tests.fuzz.targets import TARGETS

_HANG_SECONDS: Final = 2.0
_LIMITS: Final = Limits(memory_bytes=2 * 1024**3, processor_seconds=3600)
_OUT: Final = Path("benchmarks/results/reliability/fuzz.json")


def run(name: str, *, first: int, count: int, seed: int, notes: Path) -> None:
    """Judge the cases of a target, in this process, and note what came of each."""
    warnings.simplefilter("ignore")
    limit_self(_LIMITS)
    target = TARGETS[name]
    figures = {"cases": 0, "taken": 0, "hangs": 0, "slowest_seconds": 0.0, "faults": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, count):
            case = target.make(random.Random(f"{seed}/{name}/{number}"))
            started = time.perf_counter()
            try:
                figures["taken"] += target.judge(case, Path(folder))
            except Exception as error:  # noqa: BLE001 - any is a fault of ours, and counted
                figures["faults"].append([number, repr(error)[:200]])
            seconds = time.perf_counter() - started
            figures["cases"] += 1
            figures["hangs"] += seconds > _HANG_SECONDS
            figures["slowest_seconds"] = round(max(figures["slowest_seconds"], seconds), 3)
            if number % 100 == 99 or number == count - 1:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                figures["peak_mib"] = peak // 1024
                notes.write_text(json.dumps({**figures, "next": number + 1}))


def measured(name: str, *, count: int, seed: int) -> dict[str, Any]:
    """Run a target in processes of its own until all its cases are done."""
    total: dict[str, Any] = {"cases": 0, "taken": 0, "crashes": 0, "hangs": 0, "faults": []}
    total |= {"slowest_seconds": 0.0, "peak_mib": 0}
    started, first = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "notes.json")
        while first < count:
            notes.unlink(missing_ok=True)
            command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--notes", str(notes)]
            command += ["--first", str(first), "--count", str(count), "--seed", str(seed)]
            code = subprocess.run(command, check=False).returncode
            found = json.loads(notes.read_text()) if notes.exists() else {}
            for key in ("cases", "taken", "hangs"):
                total[key] += found.get(key, 0)
            total["faults"] += found.get("faults", [])
            for key in ("slowest_seconds", "peak_mib"):
                total[key] = max(total[key], found.get(key, 0))
            if code == 0:
                break
            # What died is among the hundred after the last note; they are passed over.
            first = found.get("next", first) + 100
            total["crashes"] += 1
    return {**total, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    """Run all targets, or one of them as its child, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_OUT)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--notes", type=Path)
    chosen = parser.parse_args()
    if chosen.notes is not None:
        run(
            chosen.target,
            first=chosen.first,
            count=chosen.count,
            seed=chosen.seed,
            notes=chosen.notes,
        )
        return 0
    figures = {}
    for name in [chosen.target] if chosen.target else TARGETS:
        figures[name] = measured(name, count=chosen.count, seed=chosen.seed)
        print(name, figures[name], flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    told = {"seed": chosen.seed, "hang_seconds": _HANG_SECONDS, "targets": figures}
    chosen.out.write_text(json.dumps(told, indent=1) + "\n")
    bad = [
        name for name, each in figures.items() if each["crashes"] + each["hangs"] or each["faults"]
    ]
    print("faults in:", ", ".join(bad) or "none")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
