"""The service under an offered load: throughput, latency and what it turns away.

    python -m benchmarks.serving.load       # benchmarks/results/serving/load.json

`grit up` in a home of its own, the digits VLM, 20 adapters, real HTTP. Requests arrive at random
times (Poisson) whether or not the ones before were answered, as those of many independent callers
do, so that a service that falls behind is seen to: latency counts from the intended arrival. Half
of them are streamed; the time to the first token is theirs. The capacity is found first, with 16
callers of whom each waits for its answer; the offered loads are fractions of it.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from benchmarks.measure import write_result
from benchmarks.serving.deployment import API, INFERENCE, MODEL, Deployment, running_service
from benchmarks.serving.questions import Question, make_questions, write_varied_adapters
from benchmarks.serving.traffic import Ask, End, Outcome, ask

NUM_ADAPTERS: Final = 20
NUM_EACH: Final = 12
MAX_NEW_TOKENS: Final = 32
FRACTIONS: Final = (0.25, 0.5, 0.75, 0.9, 1.1, 1.5, 2.0)
"""Of the capacity."""
NUM_CALLERS: Final = 16


def asks_of(questions: Sequence[Question], adapters: Sequence[str], *, stream: bool) -> list[Ask]:
    """The questions as requests to the service, under the ids that it gave the adapters."""
    return [
        Ask(
            messages=q.messages,
            adapter=None if q.adapter is None else adapters[q.adapter],
            model=MODEL,
            max_new_tokens=q.max_new_tokens,
            stream=stream,
        )
        for q in questions
    ]


def new_client(deployment: Deployment) -> httpx.AsyncClient:
    """A client with room for every request that may wait at once."""
    return httpx.AsyncClient(
        base_url=deployment.url,
        headers=deployment.headers,
        timeout=httpx.Timeout(180.0),
        limits=httpx.Limits(max_connections=2000, max_keepalive_connections=64),
    )


async def capacity(
    client: httpx.AsyncClient, asks: Sequence[Ask], *, seconds: float, num_callers: int
) -> dict[str, float]:
    """Answers and tokens a second with callers who each wait for their answer."""
    outcomes: list[Outcome] = []
    deadline = time.perf_counter() + seconds

    async def call(number: int) -> None:
        chosen = random.Random(number)
        while time.perf_counter() < deadline:
            outcomes.append(await ask(client, chosen.choice(asks)))

    started = time.perf_counter()
    await asyncio.gather(*(call(number) for number in range(num_callers)))
    spent = time.perf_counter() - started
    answered = [one for one in outcomes if one.end is End.ANSWERED]
    return {
        "num_callers": num_callers,
        "answers_per_second": len(answered) / spent,
        "tokens_per_second": sum(one.completion_tokens for one in answered) / spent,
        "latency_p50_seconds": quantile([one.seconds for one in answered], 0.5),
        "not_answered": len(outcomes) - len(answered),
    }


async def offer(
    client: httpx.AsyncClient, asks: Sequence[Ask], *, rate: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Send requests at random times at a mean rate, and wait for what became of all."""
    chosen = random.Random(seed)
    arrivals, at = [], 0.0
    while (at := at + chosen.expovariate(rate)) < seconds:
        arrivals.append((at, chosen.choice(asks)))
    began = time.perf_counter()

    async def one(at: float, request: Ask) -> tuple[float, Outcome]:
        late = time.perf_counter() - began - at
        return late, await ask(client, request)

    tasks = []
    for at, request in arrivals:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(at, request)))
    outcomes = await asyncio.gather(*tasks)
    return _level(rate, outcomes, spent=time.perf_counter() - began, seconds=seconds)


def _level(
    rate: float, outcomes: Sequence[tuple[float, Outcome]], *, spent: float, seconds: float
) -> dict[str, Any]:
    answered = [(late, one) for late, one in outcomes if one.end is End.ANSWERED]
    latencies = [late + one.seconds for late, one in answered]
    firsts = [late + one.first_seconds for late, one in answered if one.first_seconds is not None]
    codes = Counter(one.code for _, one in outcomes if one.end is End.REFUSED)
    return {
        "offered_per_second": rate,
        "seconds": seconds,
        "seconds_until_the_last_answer": spent,
        "num_requests": len(outcomes),
        "num_answered": len(answered),
        "answers_per_second": len(answered) / spent,
        "tokens_per_second": sum(one.completion_tokens for _, one in answered) / spent,
        "shed_share": sum(one.shed for _, one in outcomes) / max(1, len(outcomes)),
        "refused": dict(codes),
        "broken": [one.fault for _, one in outcomes if one.end is End.BROKEN],
        "latency_p50_seconds": quantile(latencies, 0.5),
        "latency_p99_seconds": quantile(latencies, 0.99),
        "first_token_p50_seconds": quantile(firsts, 0.5),
        "first_token_p99_seconds": quantile(firsts, 0.99),
        "sent_late_p99_seconds": quantile([late for late, _ in outcomes], 0.99),
    }


def quantile(values: Sequence[float], q: float) -> float:
    """A quantile; not a number where there is nothing."""
    return float(np.quantile(values, q)) if values else float("nan")


async def measure(deployment: Deployment, asks: Sequence[Ask], *, seconds: float) -> dict[str, Any]:
    """Capacity first, then every offered load."""
    async with new_client(deployment) as client:
        for request in asks:  # every adapter comes to the worker's disk
            await ask(client, request)
        alone = await capacity(client, asks, seconds=seconds, num_callers=1)
        full = await capacity(client, asks, seconds=seconds, num_callers=NUM_CALLERS)
        print(
            f"alone {alone['answers_per_second']:.1f}, {NUM_CALLERS} callers"
            f" {full['answers_per_second']:.1f} answers/s"
        )
        levels = []
        for number, fraction in enumerate(FRACTIONS):
            rate = fraction * full["answers_per_second"]
            level = await offer(client, asks, rate=rate, seconds=seconds, seed=number)
            levels.append({"fraction_of_capacity": fraction, **level})
            print(
                f"{rate:.1f}/s offered: {level['answers_per_second']:.1f} answered,"
                f" p50 {level['latency_p50_seconds']:.2f} s,"
                f" p99 {level['latency_p99_seconds']:.2f} s, shed {level['shed_share']:.0%}"
            )
            await asyncio.sleep(1.0)
    usages = {name: deployment.usage(name) for name in (API, INFERENCE)}
    memory = {name: found.resident_bytes for name, found in usages.items() if found}
    return {"alone": alone, "capacity": full, "levels": levels, "resident_bytes": memory}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each offered load")
    parser.add_argument("--max-waiting-per-team", type=int, default=64)
    options = parser.parse_args()
    environment = {"GRIT_INFER_MAX_WAITING_PER_TEAM": str(options.max_waiting_per_team)}
    with tempfile.TemporaryDirectory() as folder:
        sources = write_varied_adapters(Path(folder, "adapters"), num_adapters=NUM_ADAPTERS)
        questions = make_questions(
            NUM_ADAPTERS, num_each=NUM_EACH, max_new_tokens=MAX_NEW_TOKENS, seed=0
        )
        with running_service(Path(folder), environment=environment) as deployment:
            ids = deployment.add_adapters(sources)
            half = len(questions) // 2
            random.Random(0).shuffle(questions)
            asks = asks_of(questions[:half], ids, stream=True)
            asks += asks_of(questions[half:], ids, stream=False)
            result = asyncio.run(measure(deployment, asks, seconds=options.seconds))
    print(write_result("serving/load", {"num_adapters": NUM_ADAPTERS, **vars(options), **result}))


if __name__ == "__main__":
    main()
