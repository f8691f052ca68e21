"""A1, A2 and A3: the API's answers a second beside those of a hand-written app, taking turns."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

import httpx

from benchmarks.load.bare import PRESET
from benchmarks.load.rows import MODELS, NUM_TEAMS, Filled, job_body
from benchmarks.load.stand import Server, Stand, say
from benchmarks.load.wrk import Ask, Told, drive
from benchmarks.measure import paired_ratio
from benchmarks.serving.turns import ratio, take_turns, to_json

CONNECTIONS: Final = 16
NUM_JOBS_READ: Final = 2000
NAMES: Final = ("A1", "A2", "A3")


def plain(database: Filled) -> tuple[list[Ask], list[Ask]]:
    """A1: an authenticated answer that needs no database."""
    path = f"/presets/{PRESET}"
    return [Ask(path=path, token=token) for token in database.tokens], [Ask(path="/plain")]


def read(database: Filled) -> tuple[list[Ask], list[Ask]]:
    """A2: jobs of all ages, statuses and teams, each with its team's key."""
    step = max(1, database.num_jobs // NUM_JOBS_READ)
    numbers = range(1, database.num_jobs + 1, step)
    ours = [
        Ask(path=f"/jobs/{database.job_id(number)}", token=database.token_of(number))
        for number in numbers
    ]
    return ours, [Ask(path=ask.path) for ask in ours]


def submit(database: Filled) -> tuple[list[Ask], list[Ask]]:
    """A3: new jobs of all teams; each has another name."""
    asks = []
    for number in range(NUM_TEAMS):
        body = job_body(MODELS[0], database.datasets[number], name="nightly-{n}")
        asks.append(
            Ask(method="POST", path="/jobs", token=database.tokens[number], body=json.dumps(body))
        )
    return asks, asks


CASES: Final[dict[str, Callable[[Filled], tuple[list[Ask], list[Ask]]]]] = {
    "A1": plain,
    "A2": read,
    "A3": submit,
}


@contextmanager
def both(stand: Stand, database: Filled) -> Iterator[tuple[Server, Server]]:
    """Run the API and the bare app; they take turns on the same core."""
    with stand.service(database) as ours, stand.bare(database) as bare:
        yield ours, bare


def compare(
    stand: Stand, database: Filled, names: Sequence[str], *, rounds: int, seconds: float
) -> dict[str, Any]:
    """Measure the cases by their names."""
    found = {}
    with both(stand, database) as (ours, bare):
        for name in names:
            found[name] = _case(name, ours, bare, database, rounds=rounds, seconds=seconds)
            shown = found[name]["ratio"]
            say(f"{name}: {shown['median_ratio']:.3f} ({shown['low']:.3f}, {shown['high']:.3f})")
    return found


def _case(
    name: str, ours: Server, bare: Server, database: Filled, *, rounds: int, seconds: float
) -> dict[str, Any]:
    asks = dict(zip(("ours", "bare"), CASES[name](database), strict=True))
    servers = {"ours": ours, "bare": bare}
    told: dict[str, list[Told]] = {"ours": [], "bare": []}
    processor: dict[str, list[float]] = {"ours": [], "bare": []}

    def arm(which: str) -> Callable[[int], float]:
        def measure(_: int) -> float:
            before = servers[which].processor_seconds()
            seen = drive(servers[which].url, asks[which], seconds=seconds, connections=CONNECTIONS)
            spent = servers[which].processor_seconds() - before
            told[which].append(seen)
            processor[which].append(spent / seen.requests)
            return seen.per_second

        return measure

    for which, server in servers.items():  # caches, prepared statements, connections
        drive(server.url, asks[which], seconds=2, connections=CONNECTIONS)
    turns = take_turns({which: arm(which) for which in servers}, num_rounds=rounds, say=say)
    return {
        "ratio": ratio(turns["ours"], turns["bare"]),
        "turns": to_json(turns),
        "answer_bytes": {which: round(seen[-1].bytes_each) for which, seen in told.items()},
        "processor_seconds_each": {which: median(seen) for which, seen in processor.items()},
        # Of what one core does: also true while other programs take turns on it.
        "processor_ratio": paired_ratio(processor["bare"], processor["ours"]),
        "p50_seconds": {w: median(one.p50_seconds for one in seen) for w, seen in told.items()},
        "p99_seconds": {w: median(one.p99_seconds for one in seen) for w, seen in told.items()},
    }


def look(server: Server, ask: Ask) -> httpx.Response:
    """Ask once, to see what is answered."""
    headers = {"Authorization": f"Bearer {ask.token}"} if ask.token else {}
    return httpx.request(
        ask.method, server.url + ask.path, headers=headers, content=ask.body or None, timeout=30
    )
