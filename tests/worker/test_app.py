"""What a worker is, and that its own process stays light."""

import subprocess
import sys

import pytest

from worker.app import one_queue


def test_a_workers_own_process_loads_no_torch() -> None:
    script = (
        "import sys, worker.app, worker.tasks, worker.inference, worker.training_worker;"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("queue", ["cuda", "mps", "cpu", "infer.cpu"])
def test_a_known_queue_says_what_a_worker_is(queue: str) -> None:
    assert one_queue([queue]) == queue


@pytest.mark.parametrize("queues", [[], ["celery"], ["cpu", "cuda"], ["cpu", "infer.cpu"]])
def test_other_queues_are_refused_with_the_known_ones(queues: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Name it with -Q: cuda, mps, cpu, infer.cuda"):
        one_queue(queues)
