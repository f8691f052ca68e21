"""An action that fails is repeated all the same."""

import threading

from worker.periodic import Periodic


def test_the_first_action_comes_at_once_and_a_failure_does_not_end_the_rounds() -> None:
    rounds = threading.Semaphore(0)

    def action() -> None:
        rounds.release()
        raise ConnectionError("away")

    periodic = Periodic("test", action, interval_seconds=0.02)
    periodic.start()

    assert all(rounds.acquire(timeout=60) for _ in range(3))
    periodic.stop()
