"""What a check is: a sentence, and a function that returns figures or says why it does not hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

Figure = str | int | float
Figures = Mapping[str, Figure]


class NotHere(Exception):
    """A check that means nothing on this device, or needs more than there is; says why."""


class Fault(Exception):
    """What a check found wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What a check works with."""

    device: str
    """`cpu`, `cuda`, `cuda:1`, `mps`, or `sim` for the simulated accelerator of the tests."""
    folder: Path
    """Of this check only."""
    shared: Path
    """Of all checks of a run: models lie here."""
    short: bool = False
    """Whether to take the least work that shows the same."""

    @property
    def kind(self) -> str:
        """`cuda` for `cuda:1`."""
        return self.device.partition(":")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One of the checks."""

    name: str
    sentence: str
    """What holds when it passes."""
    run: Callable[[Bench], Figures]
    """Of a module, or a `partial` of one: it travels to another process."""
    in_short: bool
    """Whether it is part of the shortened form."""
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of one."""

    name: str
    sentence: str
    outcome: str
    """`passed`, `failed` or `not here`."""
    seconds: float
    figures: Figures = field(default_factory=dict)
    remark: str = ""
    """Why it failed or did not run."""


CHECKS: Final[list[Check]] = []
"""In the order in which they run."""


def check(
    sentence: str, *, name: str = "", in_short: bool = False, timeout_seconds: float = 180
) -> Callable[[Callable[[Bench], Figures]], Callable[[Bench], Figures]]:
    """Add a function to the checks; its name is the check's unless another is given."""

    def add(run: Callable[[Bench], Figures]) -> Callable[[Bench], Figures]:
        CHECKS.append(
            Check(
                name=name or getattr(run, "__name__", "").replace("_", "-"),
                sentence=sentence,
                run=run,
                in_short=in_short,
                timeout_seconds=timeout_seconds,
            )
        )
        return run

    return add


def require(holds: bool, fault: str) -> None:
    """Raise what is wrong unless something holds."""
    if not holds:
        raise Fault(fault)
