"""Wrong model names beside chats: `python -m benchmarks.model_names [--names 70] [--seconds 120]`.

Starts the embedded service in a folder of its own, with a hub that never answers. Then many jobs
name models that are not there, a good folder is registered behind them, and chats go on meanwhile.
Prints one JSON object of seconds.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "digits-vlm"
CHATS = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=70)
    parser.add_argument("--seconds", type=float, default=120.0, help="when to stop waiting")
    options = parser.parse_args()
    silent = socket.create_server(("127.0.0.1", 0), backlog=1024)  # takes connections, says nothing
    home = Path(tempfile.mkdtemp(prefix="grit-names-"))
    environment = {
        **os.environ,
        "GRIT_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
        "HF_HOME": str(home / "hub"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    grit = [sys.executable, "-c", "from grit_client.cli import app; app()"]
    subprocess.run(
        [*grit, "up", "--detach"], env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    try:
        headers = {"Authorization": f"Bearer {(home / 'key').read_text().strip()}"}
        client = httpx.Client(base_url=(home / "url").read_text().strip(), headers=headers)
        client.timeout = httpx.Timeout(options.seconds + 60)
        print(json.dumps(measure(client, options.names, options.seconds), indent=2))
    finally:
        subprocess.run(
            [*grit, "down"], env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        shutil.rmtree(home, ignore_errors=True)
        silent.close()
    return 0


def measure(client: httpx.Client, names: int, seconds: float) -> dict[str, Any]:
    register(client, "digits-vlm", seconds=300)
    chat(client)
    quiet = [chat(client) for _ in range(CHATS)]
    rows = (ROOT / "examples/digits/rotated-inverted-heldout.jsonl").read_bytes()
    dataset = client.post("/datasets", files={"file": ("rows.jsonl", rows)}).json()["id"]
    answers: list[tuple[float, int]] = []
    good: list[float] = []

    def wrong(number: int) -> None:
        started = time.perf_counter()
        body = {"model": f"org/digits-vlm-{number}", "dataset": dataset, "preset": "smolvlm_fast"}
        status = client.post("/jobs", json=body).status_code
        answers.append((time.perf_counter() - started, status))

    with ThreadPoolExecutor(names + 1) as pool:
        for number in range(names):
            pool.submit(wrong, number)
        time.sleep(1)
        behind = threading.Thread(
            target=lambda: good.append(register(client, "good", seconds=seconds))
        )
        behind.start()
        busy = [chat(client) for _ in range(CHATS)]
        behind.join()
    taken = sorted(each for each, _ in answers)
    return {
        "wrong names answered": {
            "first": taken[0],
            "median": statistics.median(taken),
            "last": taken[-1],
        },
        "statuses": sorted({status for _, status in answers}),
        "good folder ready": good[0] if good[0] < seconds else f"not within {seconds:g}",
        "chat alone": {"median": statistics.median(quiet), "longest": max(quiet)},
        "chat beside them": {"median": statistics.median(busy), "longest": max(busy)},
    }


def register(client: httpx.Client, name: str, *, seconds: float) -> float:
    started = time.perf_counter()
    client.post("/models", json={"id": name, "source": str(MODEL)}).raise_for_status()
    while time.perf_counter() - started < seconds:
        if client.get(f"/models/{name}").json()["status"] == "ready":
            break
        time.sleep(0.1)
    return time.perf_counter() - started


def chat(client: httpx.Client) -> float:
    body = {"model": "digits-vlm", "prompt": "Which digit is this?", "max_new_tokens": 2}
    started = time.perf_counter()
    client.post("/infer", json=body).raise_for_status()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
