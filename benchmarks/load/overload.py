"""F41: ten times the sustainable rate of submissions, of which the limits admit what is sustained.

One team floods; another goes on submitting one job after another. What is turned away must be
turned away at once, memory must not grow, and the other team's submissions must hardly be slower.
"""

import json
import threading
import time
from collections import Counter
from typing import Any, Final

import httpx
import numpy as np

from benchmarks.load.ratios import submit
from benchmarks.load.rows import MODELS, Filled, job_body
from benchmarks.load.stand import Server, Stand, say
from benchmarks.load.wrk import Ask, drive
from store.database import create_engine_from, transaction
from store.models import Team
from store.settings import Settings

CONNECTIONS: Final = 64
ADMITTED_PER_MINUTE: Final = 60
CALM_SECONDS: Final = 5.0
QUIET_TEAM: Final = 1


class Quiet(threading.Thread):
    """A caller that submits one job after another, and notes what it took."""

    def __init__(self, server: Server, ask: Ask) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self._server, self._ask, self._ended = server, ask, threading.Event()

    def run(self) -> None:
        """Submit until told to end."""
        headers = {"Authorization": f"Bearer {self._ask.token}", "Content-Type": "application/json"}
        with httpx.Client(base_url=self._server.url, headers=headers, timeout=30) as client:
            while not self._ended.wait(0.05):
                started = time.perf_counter()
                answer = client.post("/jobs", content=self._ask.body)
                self.seconds.append(time.perf_counter() - started)
                self.statuses[answer.status_code] += 1

    def end(self) -> dict[str, Any]:
        """Stop; what it saw."""
        self._ended.set()
        self.join()
        p50, p99 = np.quantile(self.seconds, [0.5, 0.99])
        return {
            "p50_seconds": float(p50),
            "p99_seconds": float(p99),
            "statuses": {str(status): count for status, count in self.statuses.items()},
        }


def quiet_ask(database: Filled) -> Ask:
    """The submission of the team that does not flood."""
    body = job_body(MODELS[0], database.datasets[QUIET_TEAM])
    token = database.tokens[QUIET_TEAM]
    return Ask(method="POST", path="/jobs", token=token, body=json.dumps(body))


def measure(stand: Stand, num_jobs: int, *, seconds: float) -> dict[str, Any]:
    """Calm, then the flood, with a quiet team all along."""
    database = stand.database(num_jobs)
    asks, _ = submit(database)
    with stand.service(database) as server:
        drive(server.url, asks, seconds=2, connections=16)
        full = drive(server.url, asks, seconds=seconds, connections=16).per_second
    limits = {"GRIT_RATE_SUBMISSIONS_PER_MINUTE": str(ADMITTED_PER_MINUTE)}
    engine = create_engine_from(Settings(database_url=database.url))
    with transaction(engine) as session:  # the quiet team may submit as it likes
        session.get_one(Team, f"team-{QUIET_TEAM}").submissions_per_minute = 1_000_000
    engine.dispose()
    flood = [asks[0]]  # one team, one key
    with stand.service(database, **limits) as server:
        drive(server.url, flood, seconds=3, connections=CONNECTIONS, all_good=False)  # the burst
        calm = Quiet(server, quiet_ask(database))
        calm.start()
        time.sleep(CALM_SECONDS)
        before, idle = server.resident_bytes(), calm.end()
        busy = Quiet(server, quiet_ask(database))
        busy.start()
        told = drive(server.url, flood, seconds=seconds, connections=CONNECTIONS, all_good=False)
        found = {
            "sustained_per_second": full,
            "admitted_per_minute": ADMITTED_PER_MINUTE,
            "offered_per_second": told.per_second,
            "shed_share": told.refused / told.requests,
            "broken": told.failed + told.timeouts,
            "flood_p50_seconds": told.p50_seconds,
            "flood_p99_seconds": told.p99_seconds,
            "quiet_before": idle,
            "quiet_during": busy.end(),
            "resident_bytes_before": before,
            "resident_bytes_after": server.resident_bytes(),
        }
    say(f"offered {told.per_second:.0f}/s, shed {found['shed_share']:.3f}")
    return found
