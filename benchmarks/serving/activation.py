"""Activating an adapter with a hundred resident, against PEFT's `load_adapter` (I6).

    python -m benchmarks.serving.activation # benchmarks/results/serving/activation.json

SmolVLM-256M's shape, adapters of rank 16 on the text model (19.5 MB each), their files in the page
cache. Both arms have a hundred adapters and bring in another one, never seen before in this
process; what makes room is not timed for PEFT (`delete_adapter`) and is for ours, whose slots are
full. Ours is measured twice: from the files, with everything that is validated about
them (this is I6), and from the copy in main memory, for an adapter that lost its slot. The peer has
its best flag (`low_cpu_mem_usage`); `--plainly` measures it without as well.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.measure import write_result
from benchmarks.serving.adapters import BaseShape, write_adapters
from benchmarks.serving.bases import write_smolvlm
from benchmarks.serving.ours import ObservedEngine
from benchmarks.serving.peers import Peer
from benchmarks.serving.prompts import text_prompt
from benchmarks.serving.turns import ratio, take_turns, to_json
from grit_core.generation import AdapterSource, GenerationRequest
from grit_core.serving.resident_model import ResidentModel

NUM_RESIDENT: Final = 100
NUM_CONTENTS: Final = 8
RANK: Final = 16
GIBIBYTE: Final = 1024**3


class Ours:
    """An engine with its slots full."""

    def __init__(
        self, source: Path, resident: Sequence[AdapterSource], fresh: Iterator[AdapterSource]
    ) -> None:
        self._engine = ObservedEngine(
            max_adapters=len(resident), max_batch=1, max_adapter_bytes=4 * GIBIBYTE
        )
        self._source, self._fresh = str(source), fresh
        request = GenerationRequest(chat=text_prompt(0).chat, max_new_tokens=1)
        for adapter in resident:
            self._engine.generate(self._source, request, adapter=adapter)
        self._model: ResidentModel = self._engine.tickets[-1].resident
        if len(self._model.slots.resident) != len(resident):
            raise RuntimeError(f"{len(self._model.slots.resident)} adapters are resident")

    def from_files(self, number: int) -> float:
        """Seconds until an adapter that was never seen has its slot."""
        adapter = next(self._fresh)
        started = time.perf_counter()
        self._activate(adapter)
        return time.perf_counter() - started

    def from_memory(self, number: int) -> float:
        """Seconds until an adapter whose copy is in main memory has its slot again."""
        adapter = next(self._fresh)
        weights = self._engine._load_adapter(self._source, self._model, adapter)  # noqa: SLF001 - a look inside
        started = time.perf_counter()
        self._model.slots.release(self._model.slots.acquire(weights))
        return time.perf_counter() - started

    def resident(self, number: int) -> float:
        """Seconds until an adapter that has its slot is found there."""
        adapter = next(self._fresh)
        self._activate(adapter)
        started = time.perf_counter()
        self._activate(adapter)
        return time.perf_counter() - started

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _activate(self, adapter: AdapterSource) -> None:
        # Nobody asks meanwhile, so that the engine's own thread is asleep.
        weights = self._engine._load_adapter(self._source, self._model, adapter)  # noqa: SLF001 - a look inside
        self._model.slots.release(self._model.slots.acquire(weights))


class Theirs:
    """PEFT with as many adapters."""

    def __init__(
        self, source: Path, resident: Sequence[AdapterSource], fresh: Iterator[AdapterSource]
    ) -> None:
        self._peer, self._fresh = Peer(source, resident), fresh

    def load(self, number: int) -> float:
        """At its best flags."""
        return self._load(quickly=True)

    def load_plainly(self, number: int) -> float:
        """As it comes."""
        return self._load(quickly=False)

    def _load(self, *, quickly: bool) -> float:
        """Seconds of `load_adapter` and `set_adapter`; the adapter leaves again."""
        adapter = next(self._fresh)
        started = time.perf_counter()
        self._peer.load_adapter(adapter, quickly=quickly)
        self._peer.set_adapter(adapter)
        spent = time.perf_counter() - started
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was active which is now deleted")
            self._peer.delete_adapter(adapter)
        return spent


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resident", type=int, default=NUM_RESIDENT)
    parser.add_argument("--plainly", action="store_true", help="PEFT without its flag as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    num_fresh = 5 * (options.rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        source = write_smolvlm(Path(folder) / "smolvlm")
        made = write_adapters(
            Path(folder) / "adapters",
            BaseShape.of(source),
            num_adapters=options.resident + num_fresh,
            num_contents=NUM_CONTENTS,
            rank=RANK,
        )
        fresh = iter(made[options.resident :])
        ours = Ours(source, made[: options.resident], fresh)
        theirs = Theirs(source, made[: options.resident], fresh)
        arms = {
            "from_files": ours.from_files,
            "peft": theirs.load,
            "from_memory": ours.from_memory,
            "resident": ours.resident,
        }
        if options.plainly:
            arms["peft_plainly"] = theirs.load_plainly
        for arm in arms.values():
            arm(0)
        turns = take_turns(arms, num_rounds=options.rounds, say=print)
        ours.close()
    ratios: dict[str, Any] = {
        name: ratio(turns[name], turns["peft"]) for name in turns if not name.startswith("peft")
    }
    if options.plainly:
        ratios["from_files_to_peft_plainly"] = ratio(turns["from_files"], turns["peft_plainly"])
    for name, one in ratios.items():
        print(f"{name}: {one['median_ratio']:.4f} ({one['low']:.4f}, {one['high']:.4f})")
    result = {"options": vars(options), "ratios": ratios, "turns": to_json(turns)}
    print(write_result("serving/activation", result))


if __name__ == "__main__":
    main()
