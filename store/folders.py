"""Folders that a process makes for itself."""

from pathlib import Path


def make_folder(folder: Path, *, what: str, setting: str) -> None:
    """Make a folder unless it is there.

    Args:
        folder: Where.
        what: What it is for, in words.
        setting: The variable that says where.

    Raises:
        ValueError: If it cannot be made; in words for an operator.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{what} {folder} cannot be made ({error.strerror}); set {setting} to a folder that"
            " this user may write to"
        ) from None
