"""Write the OpenAPI document: `python -m api.openapi [FILE]`, by default `docs/openapi.json`."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from api.app import create_app
from store.settings import Settings


def snapshot() -> dict[str, Any]:
    """Return the document of an app with default settings."""
    with tempfile.TemporaryDirectory() as folder:
        return create_app(Settings(home=Path(folder), database_url="", objects_url="")).openapi()


def main(arguments: list[str]) -> int:
    """Write the document and return the exit status."""
    path = Path(arguments[0] if arguments else "docs/openapi.json")
    path.write_text(f"{json.dumps(snapshot(), indent=1, sort_keys=True)}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
