"""Types that several schemas share."""

import re
from datetime import datetime
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictStr


class Body(BaseModel):
    """Base of request bodies: nothing unknown, nothing that is not a number."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class Answer(BaseModel):
    """Base of answers."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


_ALLOWED_CONTROL: Final = frozenset("\t\n\r")


def _plain(text: str) -> str:
    if any(ord(character) < 32 and character not in _ALLOWED_CONTROL for character in text):
        raise ValueError("control characters are not allowed in text")
    return text


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters are allowed here, on one line")
    return text


_MOMENT: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?([Zz]|[+-]\d\d:?\d\d)?", re.ASCII
)


def _written_out(value: Any) -> Any:
    # pydantic takes numbers too, as seconds since 1970: a slip would become a moment long past.
    if isinstance(value, datetime) or (isinstance(value, str) and _MOMENT.fullmatch(value)):
        return value
    raise ValueError("a moment is a text such as 2027-01-31T12:00:00Z")


Moment = Annotated[datetime, BeforeValidator(_written_out)]
"""A date and a time as RFC 3339 writes them."""
Text = Annotated[StrictStr, AfterValidator(_plain)]
"""Written words: no control characters but tabs and line ends."""
Line = Annotated[StrictStr, AfterValidator(_one_line)]
"""A name or an id: printable, on one line."""
Id = Annotated[Line, Field(min_length=1, max_length=64)]
"""An id that we gave."""
ModelName = Annotated[Line, Field(min_length=1, max_length=512)]
"""A base model: a registered id, an allowed folder or a hub id."""
Name = Annotated[Line, Field(max_length=200)]
"""What people call a thing."""
