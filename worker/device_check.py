"""`python -m worker.device_check cuda`: multiplies a matrix there; status 0 if it is right."""

from __future__ import annotations

import sys

_SIZE = 256


def main(device: str) -> int:
    """Compute on the device, and say what is wrong with it if something is."""
    import torch

    try:
        ones = torch.ones(_SIZE, _SIZE, device=device)
        total = float((ones @ ones).sum())
    except (RuntimeError, AssertionError, ValueError) as error:  # torch's words for no such device
        sys.stdout.write(str(error).strip().splitlines()[0])
        return 1
    if total != float(_SIZE**3):
        sys.stdout.write(f"a product of ones came to {total}, not {_SIZE**3}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
