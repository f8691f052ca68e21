"""The home folder: where the embedded service keeps everything, and where its key is found.

Only its owner may enter it (0700). `key` and `url` let the command line and the Python client find
the service by themselves.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from grit_client.errors import EmbeddedError, InvalidInput

DEFAULT_HOME = Path(".grit")
DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Home:
    """Names of the files in a home folder."""

    folder: Path

    @classmethod
    def at(cls, folder: Path | str | None = None) -> "Home":
        """The home at a folder, by default `.grit` in the working folder."""
        return cls(Path(folder or DEFAULT_HOME).expanduser().absolute())

    @property
    def key_file(self) -> Path:
        """Written by the API at its first start; one line, the key."""
        return self.folder / "key"

    @property
    def url_file(self) -> Path:
        """Written once the API listens."""
        return self.folder / "url"

    @property
    def state_file(self) -> Path:
        """Which processes run, with their start times."""
        return self.folder / "service.json"

    @property
    def lock_file(self) -> Path:
        """Locked by the supervisor for as long as it lives."""
        return self.folder / "lock"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.folder / "logs"

    @property
    def broker_folder(self) -> Path:
        """The embedded broker's configuration, password and append-only file."""
        return self.folder / "broker"

    def prepare(self) -> None:
        """Create the folders, for their owner only.

        Raises:
            EmbeddedError: A folder cannot be created or is another user's.
        """
        try:
            for folder in (self.folder, self.logs, self.broker_folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.chmod(0o700)
        except OSError as error:
            raise EmbeddedError(
                f"The folder {self.folder} cannot be used: {error.strerror}. Name another with"
                " --home or GRIT_HOME."
            ) from None

    def read_key(self) -> str | None:
        """The key of the embedded service; None when there is none."""
        return _line(self.key_file)

    def read_url(self) -> str | None:
        """The address of the embedded service; None when it was never started."""
        return _line(self.url_file)

    def write_private(self, path: Path, text: str) -> None:
        """Replace a file in one step; only its owner can read it."""
        fresh = path.with_name(f"{path.name}.new")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        fresh.replace(path)


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # such as the home of another user
        raise InvalidInput(
            f"{path} cannot be read: {error.strerror}. Name another folder with --home, or give"
            " --url and --key."
        ) from None
