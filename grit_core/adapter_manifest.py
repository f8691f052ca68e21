"""What serving needs of an adapter's `grit.json`: the tokens that end the turns it was trained on.

An adapter of another origin has no such file, and then none of these tokens. The file may come from
an untrusted upload, so its size is bounded before it is read and its values are validated.
"""

from pathlib import Path
from typing import Any, Final

from grit_core.adapter_settings import parse_json, shown
from grit_core.errors import AdapterInvalid

MANIFEST: Final = "grit.json"
MAX_MANIFEST_BYTES: Final = 16 * 1024**2
"""The plan of ten thousand layers takes a third of it."""
MAX_END_TOKENS: Final = 16
MAX_TOKEN_ID: Final = 2**31 - 1


def read_end_of_turn(folder: Path) -> tuple[int, ...]:
    """Return the ids of the tokens that end a turn, in order; empty when the folder names none.

    Raises:
        AdapterInvalid: The file is too large, or is not as training writes it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return ()
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise AdapterInvalid(
            f"{MANIFEST} has {size} bytes; at most {MAX_MANIFEST_BYTES} are read. Remove the file:"
            " answers do not need it."
        )
    try:
        manifest = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{MANIFEST} is not JSON: {error}. Remove the file.") from error
    if not isinstance(manifest, dict):
        raise AdapterInvalid(f"{MANIFEST} is no JSON object. Remove the file.")
    return _token_ids(manifest.get("end_of_turn"))


def _token_ids(entry: Any) -> tuple[int, ...]:
    """Read the entry `end_of_turn`.

    Raises:
        AdapterInvalid: It is not a text with its token ids.
    """
    if entry is None:
        return ()
    ids = entry.get("token_ids") if isinstance(entry, dict) else None
    if not isinstance(ids, list) or len(ids) > MAX_END_TOKENS:
        raise AdapterInvalid(
            f"{MANIFEST} has end_of_turn {shown(entry)}; it is an object with token_ids, a list of"
            f" at most {MAX_END_TOKENS} numbers. Remove the entry."
        )
    for token in ids:
        if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
            raise AdapterInvalid(
                f"{MANIFEST} has the token id {shown(token)} in end_of_turn/token_ids; ids are"
                f" whole numbers from 0 to {MAX_TOKEN_ID}. Remove the entry."
            )
    return tuple(ids)
