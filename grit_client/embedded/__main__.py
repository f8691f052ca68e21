"""The supervisor in the background: `python -m grit_client.embedded HOME`, options on stdin."""

import json
import sys

from grit_client.embedded.control import run_here
from grit_client.embedded.supervisor import Options
from grit_client.errors import EmbeddedError
from grit_client.home import Home


def main() -> int:
    """Run until a signal; the reason of a failure is in the record, for whoever waits."""
    options = Options(**json.loads(sys.stdin.read()))
    try:
        run_here(Home.at(sys.argv[1]), options, say=_say)
    except EmbeddedError as error:
        _say(str(error))
        return 3
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
