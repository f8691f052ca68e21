"""`python -m tests.fuzz.rejections`: 20,000 bad requests to a service, its time and its memory."""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from tests.run_guard import start_guard

_COUNT: Final = 20_000
_WARM: Final = 1000
"""Requests after which memory is looked at first: caches are filled then."""
_OUT: Final = Path("benchmarks/results/reliability/rejections.json")
_BODIES: Final = (
    *(b"{", b"", b"[]", b'{"model": "x"}', b'{"a": NaN}', b"\xff", b"[" * 40),
    json.dumps({f"k{number}": 1 for number in range(50)}).encode(),
    b'{"model": "x", "dataset": "ds_x", "preset": "smolvlm_fast"}',
)
_WRITES: Final = ("/jobs", "/infer", "/jobs/plan", "/v1/fine_tuning/jobs", "/models")
_READS: Final = ("/jobs/x", "/datasets/x", "/adapters/%00", "/nothing", "/jobs?limit=0")


def ask(client: httpx.Client, chance: random.Random, headers: dict[str, str]) -> int:
    """Send one bad request and return the status of its answer."""
    kind = chance.random()
    if kind < 0.6:
        media = chance.choice(("application/json", "application/json", "text/plain"))
        return client.post(
            chance.choice(_WRITES),
            content=chance.choice(_BODIES),
            headers={**headers, "Content-Type": media},
        ).status_code
    if kind < 0.8:
        return client.get(chance.choice(_READS), headers=headers).status_code
    stranger = {"Authorization": f"Bearer grit_{chance.random()}"}
    return client.get("/jobs", headers=stranger).status_code


def measure(client: httpx.Client, service: psutil.Process, key: str) -> dict[str, Any]:
    """Send them all, one after another."""
    chance, headers = random.Random(1), {"Authorization": f"Bearer {key}"}
    seen: Counter[int] = Counter()
    milliseconds, first = [], 0
    for number in range(_COUNT):
        if number == _WARM:
            first = service.memory_info().rss
        started = time.perf_counter()
        seen[ask(client, chance, headers)] += 1
        milliseconds.append(1000 * (time.perf_counter() - started))
    milliseconds.sort()
    return {
        "requests": _COUNT,
        "statuses": dict(sorted(seen.items())),
        "p50_ms": round(milliseconds[_COUNT // 2], 1),
        "p99_ms": round(milliseconds[_COUNT * 99 // 100], 1),
        "resident_mib": round(service.memory_info().rss / 1024**2),
        "resident_growth_mib": round((service.memory_info().rss - first) / 1024**2, 1),
    }


def main() -> int:
    """Start a service, measure, write the figures; fail on any answer that is no rejection."""
    start_guard()
    with tempfile.TemporaryDirectory() as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        rates = ("REQUESTS", "SUBMISSIONS", "TEAM_REQUESTS", "TEAM_SUBMISSIONS")
        env = {
            **os.environ,
            **{f"GRIT_RATE_{rate}_PER_MINUTE": "0" for rate in rates},
            "GRIT_HOME": home,
            "GRIT_KEY_FILE": f"{home}/key",
            "GRIT_BROKER_URL": "redis://127.0.0.1:1/0",
        }
        subprocess.run([sys.executable, "-m", "store", "migrate"], env=env, check=True)
        command = [sys.executable, "-m", "api", "--port", str(port)]
        quiet = subprocess.DEVNULL
        with (
            subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet) as service,
            httpx.Client(
                base_url=f"http://127.0.0.1:{port}",
                timeout=30,
                transport=httpx.HTTPTransport(retries=8),
            ) as client,
        ):
            try:
                client.get("/healthz").raise_for_status()
                key = Path(home, "key").read_text().strip()
                figures = measure(client, psutil.Process(service.pid), key)
            finally:
                service.terminate()
    print(figures)
    _OUT.parent.mkdir(parents=True, exist_ok=True)
    _OUT.write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(not 400 <= status < 500 for status in figures["statuses"]))


if __name__ == "__main__":
    sys.exit(main())
