"""Where settings come from: `GRIT_*` variables, then files of secrets."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource

PREFIX: Final = "GRIT_"
FOLDER_VARIABLE: Final = "GRIT_SECRETS_FOLDER"
_FILE_PREFIX: Final = "grit_"
_MOST_BYTES: Final = 64 * 1024
_KUBERNETES: Final = re.compile(
    r"GRIT_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)


class InvalidSettings(ValueError):
    """Settings that no process can start with; one line for each fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True)
class Given:
    """A value as it was found."""

    origin: str
    """The variable, or the path of the file."""
    value: str


def read_given(default_folder: Path) -> dict[str, Given]:
    """Return what the environment and the files of secrets hold, by setting, variables first.

    An empty variable counts as unset. The keys are lower-case names without the prefix; they need
    not be settings.

    Args:
        default_folder: The folder of secrets unless `GRIT_SECRETS_FOLDER` names another.

    Raises:
        InvalidSettings: If a variable is not UTF-8 text, or a file of a secret cannot be read.
    """
    variables = _read_variables()
    faults = [
        f"{each.origin} is not UTF-8 text"
        for each in variables.values()
        if not _is_utf_8(each.value)
    ]
    if faults:
        raise InvalidSettings(faults)
    named = variables.get(FOLDER_VARIABLE.removeprefix(PREFIX).lower())
    folder = default_folder if named is None else Path(named.value).expanduser()
    if named is not None and not folder.is_dir():
        raise InvalidSettings([f"{FOLDER_VARIABLE} is {named.value!r}; there is no such folder"])
    return {**_read_files(folder), **variables}


def _read_variables() -> dict[str, Given]:
    return {
        name[len(PREFIX) :].lower(): Given(name.upper(), value)
        for name, value in os.environ.items()  # noqa: TID251 - this module is what reads it
        if name.upper().startswith(PREFIX) and value and not _is_kubernetes_link(name, value)
    }


def _is_utf_8(value: str) -> bool:
    # Other bytes are surrogates here.
    return not any("\ud800" <= each <= "\udfff" for each in value)


def _is_kubernetes_link(name: str, value: str) -> bool:
    """Tell whether Kubernetes set a variable for a Service whose name begins with "grit"."""
    if _KUBERNETES.fullmatch(name):
        return True
    return name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))


def _read_files(folder: Path) -> dict[str, Given]:
    faults: list[str] = []
    found: dict[str, Given] = {}
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise InvalidSettings([f"{folder} cannot be read: {error.strerror}"]) from None
    for path in paths:
        name = path.name.lower()
        if not name.startswith(_FILE_PREFIX):
            continue
        try:
            found[name.removeprefix(_FILE_PREFIX)] = Given(str(path), _read_file(path))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            faults.append(f"{path} cannot be read: {why}")
    if faults:
        raise InvalidSettings(faults)
    return found


def _read_file(path: Path) -> str:
    """Return a secret without the line ends that editors add; other blanks belong to it.

    Raises:
        ValueError: If the file is empty, too large or not text.
    """
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
    try:
        text = data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    if not text:
        raise ValueError("it is empty")
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    return text


class GivenSource(EnvSettingsSource):
    """Hands what was found to pydantic."""

    def __init__(self, settings_class: type[BaseSettings], given: Mapping[str, Given]) -> None:
        super().__init__(settings_class)
        self.env_vars = {f"{_FILE_PREFIX}{name}": each.value for name, each in given.items()}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Return a list from JSON; what is no JSON is left to the validation, which names it."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value
