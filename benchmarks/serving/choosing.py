"""What choosing the tokens of a step costs, without a model.

    python -m benchmarks.serving.choosing  # benchmarks/results/serving/choosing.json

Sixteen rows of random logits, about as peaked as a trained model's: greedy, sampled from the whole
distribution, and with a nucleus; and flat ones, which the likeliest tokens do not decide.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from benchmarks.measure import write_result
from grit_core.serving.constraint import Constraint
from grit_core.serving.sampling import TokenSampler
from grit_core.serving.token_chooser import TokenChooser

VOCABULARIES: Final = (49_152, 151_936)
NUM_ROWS: Final = 16
PEAKED: Final = 4.0
FLAT: Final = 0.5
"""Standard deviations of the logits."""
KINDS: Final[dict[str, tuple[float, dict[str, float]]]] = {
    "greedy": (PEAKED, {"temperature": 0.0, "top_p": 1.0}),
    "sampled": (PEAKED, {"temperature": 0.7, "top_p": 1.0}),
    "nucleus": (PEAKED, {"temperature": 0.7, "top_p": 0.9}),
    "sampled, flat": (FLAT, {"temperature": 1.0, "top_p": 1.0}),
    "nucleus, flat": (FLAT, {"temperature": 1.0, "top_p": 0.9}),
}


@dataclass
class Row:
    """A request without a model."""

    sampler: TokenSampler
    constraint: Constraint | None = None
    prompt_ids: list[int] = field(default_factory=lambda: [0])
    ids: list[int] = field(default_factory=list)


def measure(num_tokens: int, kind: str, *, device: torch.device, num_rounds: int) -> float:
    """Return the milliseconds of a step, the median of some rounds.

    Args:
        num_tokens: The vocabulary.
        kind: One of `KINDS`.
        device: Where the logits are.
        num_rounds: Steps that count.
    """
    spread, options = KINDS[kind]
    rows = [Row(TokenSampler(**options, seed=seed)) for seed in range(NUM_ROWS)]  # type: ignore[arg-type]  # no seed among them
    torch.manual_seed(0)
    logits = (torch.randn(NUM_ROWS, num_tokens) * spread).to(device)
    chooser = TokenChooser(rows, device=device)
    seconds = []
    for _ in range(num_rounds + 1):
        started = time.perf_counter()
        tokens = chooser.choose(logits)  # ends with a copy to the host: nothing is under way
        seconds.append(time.perf_counter() - started)
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
    return 1e3 * statistics.median(seconds[1:])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    for num_tokens in VOCABULARIES:
        found[str(num_tokens)] = {
            kind: measure(
                num_tokens, kind, device=torch.device(options.device), num_rounds=options.rounds
            )
            for kind in KINDS
        }
        print(num_tokens, {kind: round(ms, 2) for kind, ms in found[str(num_tokens)].items()})
    result = {"options": vars(options), "num_rows": NUM_ROWS, "step_milliseconds": found}
    print(write_result("serving/choosing", result))


if __name__ == "__main__":
    main()
