"""`python -m worker.device_check cuda`: computes on a device and compares with the right result.

The status says what was found: `EXIT_FIT`, `EXIT_FAULT` with a line that says which, or
`EXIT_NO_MEMORY` where the device has no memory left for the examination.
"""

from __future__ import annotations

import sys
from typing import Final

from grit_core.library_errors import ran_out_of_device_memory, reason

EXIT_FIT: Final = 0
EXIT_FAULT: Final = 1
EXIT_NO_MEMORY: Final = 2
_SIZE: Final = 256


class NoMemory(Exception):
    """The device has no memory left, which says nothing of its health."""


def find_fault(device: str) -> str | None:
    """Compute on a device and return what is wrong with it, in a line; none if nothing is.

    Raises:
        NoMemory: Other processes hold the memory that this takes.
    """
    import torch

    try:
        ones = torch.ones(_SIZE, _SIZE, device=device)
        total = float((ones @ ones).sum())
    except (RuntimeError, AssertionError, ValueError) as error:  # torch's words for no such device
        if ran_out_of_device_memory(error):
            raise NoMemory(reason(error)) from error
        return reason(error)
    if total != float(_SIZE**3):
        return f"a product of ones came to {total}, not {_SIZE**3}"
    return None


def main(device: str) -> int:
    """Examine a device, write what is wrong with it, and return the status."""
    try:
        fault = find_fault(device)
    except NoMemory as error:
        sys.stdout.write(str(error))
        return EXIT_NO_MEMORY
    sys.stdout.write(fault or "")
    return EXIT_FIT if fault is None else EXIT_FAULT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
