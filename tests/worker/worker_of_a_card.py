"""An inference worker on the simulated accelerator: `python -m tests.worker.worker_of_a_card`.

Each line of its standard input is a fault that the card has from then on; the first argument is one
that it has from the beginning, or `hang`.
"""

import sys

import pytest

from store.settings import Settings
from tests.accelerator import NAME
from tests.accelerator.fixtures import present
from worker import inference
from worker.inference import InferenceWorker


def main() -> None:
    """Serve until the device is lost or the input ends."""
    patch = pytest.MonkeyPatch()
    with present(patch) as card:
        if sys.argv[1:] == ["hang"]:
            patch.setattr(inference, "EXAMINATION_SECONDS", 1.0)
            card.hang()
        elif len(sys.argv) > 1:
            card.fail(sys.argv[1])
        worker = InferenceWorker(Settings(), device=NAME)
        worker.start()
        for line in sys.stdin:
            card.fail(line.strip())
        worker.close()


if __name__ == "__main__":
    main()
