"""The service's own costs: import and start of the API, reading a job, and the way to a first step.

    python -m benchmarks.service          # writes benchmarks/results/service.json

Everything runs embedded (`grit up`) in a temporary home, with SQLite. `GET /jobs/{id}` is compared
with a hand-written select behind a bare ASGI function, both under uvicorn with one process and
driven by the same client, taking turns.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measure import interleave, paired_ratio, write_result
from grit_client.client import GritClient

ROOT = Path(__file__).parents[1]
GRIT = str(Path(sys.executable).with_name("grit"))

BARE = """
import json, os, sqlite3
connection = sqlite3.connect(os.environ["BARE_DATABASE"], check_same_thread=False)
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    job = scope["path"].rpartition("/")[2]
    query = "select id, status, progress from jobs where id = ?"
    row = connection.execute(query, [job]).fetchone()
    body = json.dumps({"id": row[0], "status": row[1], "progress": row[2]}).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""


def seconds_of(command: list[str]) -> float:
    """Wall time of a command."""
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return time.perf_counter() - started


def import_times() -> dict[str, float]:
    """Importing the API against importing FastAPI and building one empty app."""
    python = [sys.executable, "-c"]
    ours, theirs = interleave(
        lambda: seconds_of([*python, "import api.app"]),
        lambda: seconds_of([*python, "import fastapi; fastapi.FastAPI()"]),
        num_pairs=9,
    )
    return paired_ratio(ours, theirs)


def start_seconds(home: Path) -> float:
    """From starting the API's process to its first answer on /healthz."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRIT_HOME": str(home), "GRIT_KEY_FILE": str(home / "key")}
    subprocess.run(
        [sys.executable, "-m", "store", "migrate"], check=True, env=environment, cwd=ROOT
    )
    command = [sys.executable, "-m", "api", "--port", str(port)]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=1).status_code == 200:
                    return time.perf_counter() - started
            except httpx.TransportError:
                time.sleep(0.01)
    finally:
        process.terminate()
        process.wait()


def run_load(
    url: str, headers: dict[str, str], *, seconds: float, clients: int
) -> dict[str, float]:
    """Ask as fast as a few clients can for some seconds; requests a second and p99."""
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds

    def one() -> None:
        with httpx.Client(headers=headers) as client:
            while time.perf_counter() < deadline:
                started = time.perf_counter()
                client.get(url).raise_for_status()
                latencies.append(time.perf_counter() - started)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ordered = sorted(latencies)
    return {"rate": len(ordered) / seconds, "p99_seconds": ordered[int(len(ordered) * 0.99)]}


def read_job(client: GritClient, home: Path, job: str) -> dict[str, Any]:
    """`GET /jobs/{id}` against the bare select, taking turns."""
    module = home / "bare_app.py"
    module.write_text(BARE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "BARE_DATABASE": str(home / "grit.db")}
    command = [sys.executable, "-m", "uvicorn", "bare_app:app", "--port", str(port)]
    command += ["--log-level", "error", "--app-dir", str(home)]
    bare = subprocess.Popen(command, env=environment)
    try:
        time.sleep(2)
        authorization = {"Authorization": f"Bearer {(home / 'key').read_text().strip()}"}
        found: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
        for _ in range(5):
            ours = run_load(f"{client.base_url}/jobs/{job}", authorization, seconds=3, clients=4)
            theirs = run_load(f"http://127.0.0.1:{port}/{job}", {}, seconds=3, clients=4)
            found["ours"].append(ours)
            found["bare"].append(theirs)
    finally:
        bare.terminate()
        bare.wait()
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    pairs = zip(found["ours"], found["bare"], strict=True)
    return {**median, "rate_ratio": statistics.median(a["rate"] / b["rate"] for a, b in pairs)}


def submit_to_first_step(client: GritClient, dataset: str) -> dict[str, Any]:
    """From sending POST /jobs to the first completed step, with a warm worker; minus one step."""
    spec = json.loads((ROOT / "examples" / "jobs" / "digits.json").read_text())
    spec |= {"dataset": dataset}
    spec["training"] |= {"max_steps": 12}
    runs = []
    for _ in range(5):
        started = time.time()
        job = client.create_job(spec)
        while job["status"] not in {"succeeded", "failed", "cancelled"}:
            job = client.get_job(job["id"], wait=30)
        events = list(client.events(job["id"]))
        begun = next(e for e in events if e["type"] == "training_started")
        series = client.metrics(job["id"])["series"]
        first_step = float(series["elapsed_seconds"][0])
        at = datetime.fromisoformat(begun["created_at"]).timestamp()
        runs.append({"to_training_seconds": at - started, "first_step_seconds": first_step})
        time.sleep(8)  # the next spare warms up
    return {
        "median_seconds_before_the_first_step": statistics.median(
            run["to_training_seconds"] for run in runs
        ),
        "runs": runs,
    }


def main() -> None:
    """Measure, print and write."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    result: dict[str, Any] = {"import": import_times()}
    with tempfile.TemporaryDirectory() as folder:
        starts = [start_seconds(Path(folder) / f"start-{number}") for number in range(5)]
        result["start_to_healthz_seconds"] = {"median": statistics.median(starts), "all": starts}
        home = Path(folder) / ".grit"
        subprocess.run([GRIT, "up", "--detach", "--home", str(home)], check=True, cwd=ROOT)
        try:
            with GritClient(home=home) as client:
                client.register_model(ROOT / "examples" / "digits-vlm", id="digits-vlm")
                dataset = client.upload_dataset(
                    ROOT / "examples" / "digits" / "rotated-inverted-train.jsonl"
                )
                result["submit"] = submit_to_first_step(client, dataset["id"])
                job = next(iter(client.list_jobs()))
                result["get_job"] = read_job(client, home, job["id"])
        finally:
            subprocess.run([GRIT, "down", "--home", str(home)], check=True)
    print(json.dumps(result, indent=2))
    print(write_result("service", result))


if __name__ == "__main__":
    main()
