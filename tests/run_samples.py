"""What a run under a foreign environment must see; `test_run_guard` starts it."""

import os
import time


def test_the_environment_is_the_runs_own() -> None:
    foreign = ("GRIT_", "AWS_", "OPENAI_", "HF_", "PG")
    left = [name for name in os.environ if name.startswith(foreign) or "proxy" in name.lower()]
    assert not left
    assert time.localtime().tm_gmtoff == 0
