"""A kill at any call and at any byte of what is written leaves the old or the new, whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.torn_checkpoints import SUBJECTS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_kill_at_every_call_and_at_bytes_of_every_file_leaves_the_old_or_the_new() -> None:
    # In a process of its own: it forks, and this one has threads.
    command = [sys.executable, "-m", "tests.chaos.torn_checkpoints", "--bytes-per-file=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    outcomes = json.loads(done.stdout)
    assert [each for outcome in outcomes.values() for each in outcome["violations"]] == []
    assert done.returncode == 0
    assert outcomes.keys() == {subject.name for subject in SUBJECTS}
    for subject in SUBJECTS:
        assert outcomes[subject.name]["bytes"] >= 15
        assert outcomes[subject.name]["calls"] >= (15 if subject.in_python else 0)
