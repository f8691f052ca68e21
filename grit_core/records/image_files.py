"""Images that a row names by a relative path: safe names, and where their bytes are found."""

import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from grit_core.json_text import has_lone_surrogate

ResolveImage = Callable[[str], bytes]
"""Returns the bytes of an image named by a relative path; raises `LookupError` if there is none."""


class ImageNotFound(LookupError):
    """There is no file of that name; `hint` is a sentence on what to do."""

    def __init__(self, name: str, hint: str = "") -> None:
        super().__init__(name)
        self.hint = hint


def normalize_path(name: str) -> str:
    r"""Return a path as every system means it: `/` between names, composed letters, no `./`.

    Windows writes `\`, and macOS decomposes accented letters (NFD); both mean the same file.
    """
    path = unicodedata.normalize("NFC", name).replace("\\", "/")
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


def is_safe_path(name: str) -> bool:
    """Tell whether a name is a relative path that stays where it starts, on every system."""
    if not name or len(name.encode(errors="replace")) > 255 or "\\" in name or ":" in name:
        return False
    if has_lone_surrogate(name) or any(ord(character) < 32 for character in name):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


def images_beside(path: Path) -> ResolveImage:
    """Return a reader of images in the folder of a local dataset file, and never outside of it."""
    folder = path.resolve().parent

    def resolve(name: str) -> bytes:
        # Where a macOS archive was unpacked on another system, the letters stay decomposed.
        for spelling in dict.fromkeys((name, unicodedata.normalize("NFD", name))):
            found = (folder / spelling).resolve()
            if found.is_relative_to(folder) and found.is_file():
                return found.read_bytes()
        raise ImageNotFound(name, _hint(folder, name))

    return resolve


def _hint(folder: Path, name: str) -> str:
    """Name the file that differs from a missing one only by its case."""
    place = (folder / name).parent
    if not (place.is_relative_to(folder) and place.is_dir()):
        return ""
    wanted = PurePosixPath(name).name.casefold()
    near = [each.name for each in place.iterdir() if normalize_path(each.name).casefold() == wanted]
    return f"There is {near[0]!r}: write the name in the same case." if near else ""


def no_images(name: str) -> bytes:
    """Resolve nothing: for canonical rows, and for uploads of a bare JSONL file.

    Raises:
        ImageNotFound: Always.
    """
    hint = (
        "The file holds rows only: put it and its images into one zip or tar, or write the image"
        " as a data URL."
    )
    raise ImageNotFound(name, hint)
