"""All checks, in the order in which they run."""

from tests.check_device import device_check, memory, processes, serving, training, waits
from tests.check_device.check import CHECKS, Check

__all__ = ["CHECKS", "find_check"]

_ORDER = [module.__name__ for module in (device_check, training, serving, waits, memory, processes)]
CHECKS.sort(key=lambda check: _ORDER.index(getattr(check.run, "func", check.run).__module__))


def find_check(name: str) -> Check:
    """Return a check by its name.

    Raises:
        ValueError: There is none of that name.
    """
    for check in CHECKS:
        if check.name == name:
            return check
    raise ValueError(f"there is no check {name!r}; there are {', '.join(c.name for c in CHECKS)}")
