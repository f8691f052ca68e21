"""The subjects, by name."""

from collections.abc import Callable
from typing import Final

from benchmarks.quality.subject import Subject
from benchmarks.quality.subjects import answers, digits, real, text

SUBJECTS: Final[dict[str, Callable[[], Subject]]] = {
    "digits": digits.subject,
    "answers": answers.subject,
    "text": text.subject,
    "real": real.subject,
}
SMALL: Final = ("digits", "answers", "text")
"""Those that a sweep takes unless another is named: their runs take seconds."""
