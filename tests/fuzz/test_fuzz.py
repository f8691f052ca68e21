"""A few hundred seeded cases of all that strangers send; `make fuzz` tries 10,000 of each."""

import random
import time
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

NUM_CASES = 400
SEED = 20261123


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # decoders warn of what they see; they must not break
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_sent_is_taken_or_refused_in_time(name: str, tmp_path: Path) -> None:
    target, chance = TARGETS[name], random.Random(SEED)
    taken, slowest = 0, 0.0
    for number in range(NUM_CASES):
        case = target.make(chance)
        started = time.perf_counter()
        try:
            taken += target.judge(case, tmp_path)
        except Exception as error:
            error.add_note(f"case {number} of {name} with seed {SEED}")
            raise
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 2
    assert 0 < taken < NUM_CASES, "some of it is good, and some is not, or this tests nothing"
