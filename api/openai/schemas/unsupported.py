"""Parameters of OpenAI's that would change an answer and that we do not have: refused by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Unsupported:
    """Why a parameter is refused, and the values at which it changes nothing."""

    because: str
    allowed: tuple[Any, ...] = ()


def refuse(table: Mapping[str, Unsupported], name: str | None, value: Any) -> Any:
    """Return a value that changes nothing: null, or one of those that the table allows.

    Raises:
        PydanticCustomError: If it is another one.
    """
    rule = table[name or ""]
    if value is None or any(_same(value, each) for each in rule.allowed):
        return value
    kept = " or ".join(json.dumps(each) for each in rule.allowed)
    fix = f"leave it out, or send {kept}" if kept else "leave it out"
    words = f"not supported here: {rule.because}; {fix}"
    raise PydanticCustomError("parameter_unsupported", "{words}", {"words": words})


def _same(value: Any, allowed: Any) -> bool:
    # 0 and 0.0 are one number, but true is no 1.
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)
