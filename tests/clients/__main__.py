"""`make clients`: try clients from PyPI and npm against the embedded service.

`python -m tests.clients [CLIENT ...] [--url URL --key KEY]`. Installs each client as its lock says,
runs its checks, prints what failed and why, and writes the matrix into `docs/openai.md` when all
clients were tried. Ends with status 1 when any check failed.
"""

import argparse
import json
import subprocess
import sys

from tests.clients.environments import BUILD, CLIENTS, Client, prepare, version
from tests.clients.matrix import CHECKS, Row, write
from tests.clients.service import Target, running_service

SECONDS_FOR_A_CLIENT = 900


def main() -> int:
    """Try the clients and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("clients", nargs="*", help="names, or parts of names; all by default")
    wanted = parser.parse_args().clients
    chosen = [
        client
        for client in CLIENTS
        if not wanted or any(part in (client.name, client.lock) for part in wanted)
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    commands = {client.name: prepare(client) for client in chosen}
    with running_service(BUILD / "service") as target:
        rows = [try_client(client, commands[client.name], target) for client in chosen]
    if not wanted:
        write(rows)
    failed = sum(not passed for row in rows for passed in row.passed.values())
    print(f"{len(rows)} clients, {sum(len(row.passed) for row in rows)} checks, {failed} failed")
    return 1 if failed else 0


def try_client(client: Client, command: list[str], target: Target) -> Row:
    """Run a client's checks.

    Raises:
        RuntimeError: If the driver ends before its last check.
    """
    print(f"{client.name} {version(client)}")
    log = BUILD / f"{client.lock or client.driver.stem}.log"
    with log.open("wb") as errors:
        done = subprocess.run(
            command,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(BUILD.resolve())}
            | target.environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=SECONDS_FOR_A_CLIENT,
            check=False,
        )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    if done.returncode:
        raise RuntimeError(f"the driver of {client.name} failed; see {log}")
    for result in found:
        if not result["passed"]:
            print(f"  {result['check']}: {result['remark'][:300]}")
    unknown = {result["check"] for result in found} - CHECKS.keys()
    if unknown:
        raise RuntimeError(f"{client.name} has checks that the matrix lacks: {sorted(unknown)}")
    return Row(client.name, version(client), {each["check"]: each["passed"] for each in found})


if __name__ == "__main__":
    sys.exit(main())
