"""Several arms that take turns, round by round, each between two calibrations.

Beyond `benchmarks.measure.interleave`, which knows two arms: here a pair is dropped when the
machine's own speed moved around one of its two measurements, and the others of its round stay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.measure import calibration_seconds, paired_ratio

TOLERANCE: Final = 0.10
MIN_PAIRS: Final = 7


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One measurement of one arm."""

    value: float
    drift: float
    """How much the calibration after it differed from the one before."""

    @property
    def steady(self) -> bool:
        """Whether the machine was as fast after it as before."""
        return self.drift <= TOLERANCE


def take_turns(
    arms: Mapping[str, Callable[[int], float]], *, num_rounds: int, say: Callable[[str], None]
) -> dict[str, list[Turn]]:
    """Measure every arm once a round, in the other order every other round.

    Args:
        arms: Take the round's number and return what they measured.
        num_rounds: How many.
        say: Called with a line for each round.
    """
    found: dict[str, list[Turn]] = {name: [] for name in arms}
    for number in range(num_rounds):
        for name in list(arms)[:: 1 if number % 2 == 0 else -1]:
            before = _calibration()
            value = arms[name](number)
            found[name].append(Turn(value=value, drift=abs(_calibration() / before - 1)))
        values = ", ".join(f"{name} {turns[-1].value:.4g}" for name, turns in found.items())
        say(f"round {number + 1} of {num_rounds}: {values}")
    return found


def _calibration() -> float:
    # The best of three: what is asked is the machine's speed and not one interruption.
    return min(calibration_seconds() for _ in range(3))


def ratio(above: Sequence[Turn], below: Sequence[Turn]) -> dict[str, Any]:
    """Median of above / below over the rounds, with a 95 % bootstrap interval.

    Pairs around which the machine changed are dropped as long as `MIN_PAIRS` are left; how many
    were, and that unsteady ones had to be kept, is part of the answer.
    """
    pairs = list(zip(above, below, strict=True))
    # The steadiest first, so that what has to be kept beyond the steady ones is the least bad.
    ordered = sorted(pairs, key=lambda pair: max(one.drift for one in pair))
    num_steady = sum(all(one.steady for one in pair) for pair in pairs)
    kept = ordered[: max(num_steady, min(MIN_PAIRS, len(pairs)))]
    found = paired_ratio([a.value for a, _ in kept], [b.value for _, b in kept])
    return {
        "median_ratio": found["median_ratio"],
        "low": found["low"],
        "high": found["high"],
        "num_pairs": found["num_pairs"],
        "num_steady_pairs": num_steady,
        "above_median": found["ours_median_seconds"],
        "below_median": found["theirs_median_seconds"],
    }


def to_json(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Every single measurement."""
    return {name: [asdict(turn) for turn in found] for name, found in turns.items()}
