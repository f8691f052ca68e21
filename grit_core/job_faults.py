"""Every fault of a job's request at once, also those that stand behind other faults."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any, Final

from grit_core.errors import Fault, InvalidConfig
from grit_core.inventory import ModelInventory
from grit_core.job_spec import resolve_job

MAX_ROUNDS: Final = 4
"""How often faulty fields are taken out to see what stands behind them."""


def find_job_faults(
    spec: Mapping[str, Any],
    inventory: ModelInventory | None,
    *,
    num_rows: int | None,
    device: str,
) -> list[Fault]:
    """Return the faults of a request, each with its pointer; none where there are none.

    A fault may hide others: patterns are compared with layers only once the configuration around
    them is in order. So what is faulty is taken out and the rest is resolved again.

    Args:
        spec: The body of `POST /jobs`, whatever it holds.
        inventory: The model's layers; `None` while the model is not known.
        num_rows: Rows of the dataset; `None` while the dataset is not known.
        device: As `choose_device` chose it.
    """
    left = copy.deepcopy(dict(spec))
    found: dict[str, Fault] = {}
    for _ in range(MAX_ROUNDS):
        try:
            resolve_job(left, inventory, num_rows=num_rows, device=device)
        except InvalidConfig as error:
            fresh = [
                fault
                for fault in error.faults
                if fault.pointer not in found and (not found or _is_about(fault, left))
            ]
        else:
            break
        for fault in fresh:  # the first at a place is the cause of others there
            found.setdefault(fault.pointer, fault)
        removed = [_take_out(left, fault) for fault in fresh]
        if not any(removed):
            break
    return list(found.values())


def _is_about(fault: Fault, left: Mapping[str, Any]) -> bool:
    """Tell whether a fault is about what is left of a request, not about what was taken out."""
    steps = _steps(fault.pointer)
    if steps in ([], ["config"]):
        return False
    place: Any = left
    for step in steps[:-1]:
        place = _child(place, step)
    return place is not None and (len(steps) > 1 or _child(place, steps[0]) is not None)


def _take_out(left: dict[str, Any], fault: Fault) -> bool:
    """Remove a faulty value; return whether there was one.

    The rest of a list was checked with it, and settings of a modality depend on each other: these
    are removed as a whole.
    """
    steps = _steps(fault.pointer)
    if steps[:1] == ["config"] and len(steps) > 2 and fault.code != "unknown_field":
        steps = steps[:2]
    place: Any = left
    for step, after in itertools.zip_longest(steps, steps[1:]):
        if not isinstance(place, dict) or step not in place:
            return False
        if after is None or not isinstance(place[step], dict):
            del place[step]
            return True
        place = place[step]
    return False


def _child(place: Any, step: str) -> Any:
    if isinstance(place, Mapping):
        return place.get(step)
    if isinstance(place, list) and step.isdecimal() and int(step) < len(place):
        return place[int(step)]
    return None


def _steps(pointer: str) -> list[str]:
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
