"""How a lack of memory is told from other errors: allocators have no type of their own."""

from typing import Final

_MARKS: Final = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error's words are those of an allocator that found no room."""
    return any(mark in str(error).lower() for mark in _MARKS)
