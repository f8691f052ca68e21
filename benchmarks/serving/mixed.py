"""Sixteen adapters in one batch, against a merged adapter and against PEFT (I1, I2, I3).

    python -m benchmarks.serving.mixed      # benchmarks/results/serving/mixed.json

SmolVLM-256M's shape, sixteen adapters of rank 16 on all 210 linear layers of the text model, a row
for each, a fixed number of new tokens, float32. All arms live in one process with the same number
of threads and take turns. Tokens a second are those of decoding: prefill is left out on all sides.
Every round has prompts of its own, so that nothing is answered from a cache. The same ratios in
processor time stand beside: other programs of the machine change those less.

- `merged`: one adapter in the weights, the same engine, the same number of rows (I1);
- `merged_transformers`: the same weights under transformers' `generate`;
- `peft_mixed`: PEFT's `adapter_names`, a row for each adapter (I2);
- `peft_in_turn`: PEFT's `set_adapter` and one `generate` after another, half as many tokens (I3).
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.measure import write_result
from benchmarks.serving.adapters import BaseShape, write_adapters
from benchmarks.serving.bases import write_merged, write_smolvlm
from benchmarks.serving.ours import ObservedEngine, batch
from benchmarks.serving.peers import Peer, Run
from benchmarks.serving.prompts import Prompt, text_prompt
from benchmarks.serving.turns import Turn, ratio, take_turns, to_json
from grit_core.generation import AdapterSource

NUM_ADAPTERS: Final = 16
RANK: Final = 16
ARMS: Final = ("merged", "merged_transformers", "peft_mixed", "peft_in_turn")
BATCHES: Final = (1, 2, 4, 8, 16)
"""Numbers of adapters for the curve; each has one row."""


@dataclass(kw_only=True)
class Bench:
    """Everything that is compared."""

    source: Path
    merged_source: Path
    adapters: Sequence[AdapterSource]
    engine: ObservedEngine
    peer: Peer
    merged_peer: Peer
    num_tokens: int

    @classmethod
    def prepare(cls, folder: Path, *, num_adapters: int, num_tokens: int) -> "Bench":
        """Write models and adapters, and load them."""
        source = write_smolvlm(folder / "smolvlm")
        base = BaseShape.of(source)
        adapters = write_adapters(folder / "adapters", base, num_adapters=num_adapters, rank=RANK)
        merged = write_merged(source, adapters[0], folder / "merged")
        return cls(
            source=source,
            merged_source=merged,
            adapters=adapters,
            engine=ObservedEngine(max_adapters=num_adapters, max_batch=num_adapters),
            peer=Peer(source, adapters),
            merged_peer=Peer(merged),
            num_tokens=num_tokens,
        )

    def prompts(self, number: int, *, num_rows: int | None = None) -> list[Prompt]:
        """One round's, a row each, none of them asked before."""
        rows = num_rows or len(self.adapters)
        return [text_prompt(1000 * number + row) for row in range(rows)]

    def run(self, arm: str, prompts: Sequence[Prompt]) -> Run:
        """Answer the prompts, row i with adapter i."""
        adapters = self.adapters[: len(prompts)]
        names = [adapter.id for adapter in adapters]
        runs: dict[str, Callable[[], Run]] = {
            "ours": lambda: batch(
                self.engine, self.source, prompts, num_tokens=self.num_tokens, adapters=adapters
            ),
            "merged": lambda: batch(
                self.engine, self.merged_source, prompts, num_tokens=self.num_tokens
            ),
            "merged_transformers": lambda: self.merged_peer.batch(
                prompts, num_tokens=self.num_tokens
            ),
            "peft_mixed": lambda: self.peer.batch(prompts, num_tokens=self.num_tokens, names=names),
            "peft_in_turn": lambda: self.peer.in_turn(
                prompts, adapters, num_tokens=max(2, self.num_tokens // 2)
            ),
        }
        gc.collect()
        return runs[arm]()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the rounds gave."""

    turns: dict[str, list[Turn]]
    """Tokens a second."""
    cpu_turns: dict[str, list[Turn]]
    """Tokens a second of processor time."""
    same_tokens: list[bool]
    """Whether ours wrote the tokens of PEFT's adapters, by round."""


def measure(bench: Bench, *, num_rounds: int) -> Found:
    """All arms by turns."""
    runs: dict[str, list[Run]] = {name: [] for name in ("ours", *ARMS)}

    def arm(name: str) -> Callable[[int], float]:
        def once(number: int) -> float:
            runs[name].append(bench.run(name, bench.prompts(number + 1)))
            return runs[name][-1].rate

        return once

    for name in runs:
        bench.run(name, bench.prompts(0))
    turns = take_turns({name: arm(name) for name in runs}, num_rounds=num_rounds, say=print)
    cpu_turns = {
        name: [
            replace(turn, value=run.cpu_rate)
            for turn, run in zip(turns[name], runs[name], strict=True)
        ]
        for name in runs
    }
    same = [
        all(m[: len(t)] == t for m, t in zip(mine.tokens, theirs.tokens, strict=True))
        for mine, theirs in zip(runs["ours"], runs["peft_in_turn"], strict=True)
    ]
    return Found(turns=turns, cpu_turns=cpu_turns, same_tokens=same)


def ratios(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Ours over each peer, in tokens a second."""
    return {name: ratio(turns["ours"], turns[name]) for name in turns if name != "ours"}


def curve(bench: Bench, *, num_rounds: int) -> list[dict[str, Any]]:
    """Tokens a second by the number of adapters in the batch; medians of the rounds."""
    found = []
    for number, num_rows in enumerate(n for n in BATCHES if n <= len(bench.adapters)):
        runs: dict[str, list[Run]] = {name: [] for name in ("ours", *ARMS)}
        for repeat in range(num_rounds):
            prompts = bench.prompts(1000 + 100 * number + repeat, num_rows=num_rows)
            for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
                runs[name].append(bench.run(name, prompts))
        rates = {n: statistics.median(run.rate for run in all_) for n, all_ in runs.items()}
        cpu_rates = {n: statistics.median(r.cpu_rate for r in all_) for n, all_ in runs.items()}
        print(num_rows, rates, cpu_rates)
        point = {"tokens_per_second": rates, "tokens_per_cpu_second": cpu_rates}
        found.append({"num_adapters": num_rows, **point})
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--curve-rounds", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=NUM_ADAPTERS)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.prepare(
            Path(folder), num_adapters=options.adapters, num_tokens=options.tokens
        )
        measured = measure(bench, num_rounds=options.rounds)
        found, cpu = ratios(measured.turns), ratios(measured.cpu_turns)
        for name, one in [*found.items(), *((f"{n}, CPU", one) for n, one in cpu.items())]:
            print(f"ours / {name}: {one['median_ratio']:.2f} ({one['low']:.2f}, {one['high']:.2f})")
        result = {
            "options": vars(options),
            "rank": RANK,
            "ratios": found,
            "cpu_ratios": cpu,
            "same_tokens_as_peft": measured.same_tokens,
            "turns": to_json(measured.turns),
            "cpu_turns": to_json(measured.cpu_turns),
            "curve": curve(bench, num_rounds=options.curve_rounds),
        }
        bench.engine.close()
    print(write_result("serving/mixed", result))


if __name__ == "__main__":
    main()
