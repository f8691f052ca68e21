"""The service under random use for half an hour: no wrong answer, no broken one, no leak.

    make soak MINUTES=30      # benchmarks/results/serving/soak.json; status 1 on any violation

Adapters of several ranks on several towers; for each some questions whose greedy answers were
recorded beforehand twice: by PEFT with that adapter alone, and by the service with nobody else
asking. They must agree. Then callers ask at random, streamed and not, greedy and with a seed, go
away in mid-answer or before it, and now and then a crowd comes at once. The inference worker is
killed at random, and the supervisor starts it again. The last part passes without a kill, so that
one life of the worker is long enough to see it leak.

Every completed greedy or seeded answer must be the recorded one; every 200 must be whole; every
failure must be a documented one that may be tried again; no process may log an error; at the end
memory, file descriptors and the mailbox must be as they were after the warm-up.
"""

import argparse
import asyncio
import dataclasses
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.measure import write_result
from benchmarks.serving.deployment import (
    API,
    INFERENCE,
    MODEL,
    Deployment,
    keep_logs,
    running_service,
    wait_until,
)
from benchmarks.serving.leaks import Watch, growth, open_too_many
from benchmarks.serving.load import new_client
from benchmarks.serving.questions import (
    Question,
    answer_alone,
    make_questions,
    write_varied_adapters,
)
from benchmarks.serving.traffic import Ask, End, Outcome, ask

WATCHED: Final = (API, INFERENCE, "worker-cpu", "broker")
PAUSE_AFTER_REFUSAL_SECONDS: Final = 0.5
_HELD: Final = ("request", "running", "waiting", "teams")
"""Kinds of keys of the mailbox that stand for requests which wait or run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How rough it gets."""

    seconds: float = 1800.0
    num_adapters: int = 24
    num_each: int = 6
    num_callers: int = 10
    max_new_tokens: int = 24
    stream_share: float = 0.5
    cancel_share: float = 0.12
    seeded_share: float = 0.15
    crowd_every_seconds: float = 75.0
    crowd_size: int = 120
    kill_every_seconds: float = 90.0
    quiet_share: float = 0.35
    """The last part of the time, without kills."""
    warm_seconds: float = 120.0
    sample_seconds: float = 5.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A request and its only right answer."""

    request: Ask
    answer: str


@dataclass(kw_only=True)
class Tally:
    """What happened."""

    ends: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    """Answers compared with the recorded ones: plain, streamed, seeded."""
    tokens: int = 0
    violations: list[str] = field(default_factory=list)
    kills: list[dict[str, float]] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    """Seconds from a kill to the next answer."""

    def violate(self, words: str) -> None:
        """Note a violation; the first hundred in words."""
        self.ends["violation"] += 1
        if len(self.violations) < 100:
            self.violations.append(words)


class Soak:
    """One run against one deployment."""

    def __init__(self, deployment: Deployment, truths: Sequence[Truth], plan: Plan) -> None:
        self._deployment, self._truths, self._plan = deployment, truths, plan
        self._began = time.perf_counter()
        self._killed_at: float | None = None
        self.tally = Tally()
        self.watch = Watch(deployment, WATCHED)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() - self._began >= self._plan.seconds

    async def run(self) -> None:
        """Everything at once, until the time is up and every request has ended."""
        self._began = time.perf_counter()
        async with new_client(self._deployment) as client, asyncio.TaskGroup() as group:
            for number in range(self._plan.num_callers):
                group.create_task(self._call(client, random.Random(self._plan.seed + number)))
            group.create_task(self._crowds(client, random.Random(self._plan.seed + 1000)))
            group.create_task(self._kill(random.Random(self._plan.seed + 2000)))
            group.create_task(
                self.watch.run(every_seconds=self._plan.sample_seconds, until=lambda: self.over)
            )

    async def _call(self, client: httpx.AsyncClient, chosen: random.Random) -> None:
        while not self.over:
            outcome = await self._one(client, chosen)
            if outcome.end is End.REFUSED:
                await asyncio.sleep(PAUSE_AFTER_REFUSAL_SECONDS)

    async def _crowds(self, client: httpx.AsyncClient, chosen: random.Random) -> None:
        """A crowd beyond what may wait, so that some are turned away."""
        while not await self._sleep(chosen.uniform(0.5, 1.5) * self._plan.crowd_every_seconds):
            await asyncio.gather(*(self._one(client, chosen) for _ in range(self._plan.crowd_size)))

    async def _kill(self, chosen: random.Random) -> None:
        until = self._plan.seconds * (1.0 - self._plan.quiet_share)
        while not await self._sleep(chosen.uniform(0.5, 1.5) * self._plan.kill_every_seconds):
            at = time.perf_counter() - self._began
            if at > until:
                return
            if self._deployment.kill(INFERENCE) is not None:
                self._killed_at = time.perf_counter()
                self.tally.kills.append({"at_seconds": round(at, 1)})

    async def _sleep(self, seconds: float) -> bool:
        """Sleep, but not beyond the end; tell whether it is over."""
        left = self._plan.seconds - (time.perf_counter() - self._began)
        await asyncio.sleep(max(0.0, min(seconds, left)))
        return self.over

    async def _one(self, client: httpx.AsyncClient, chosen: random.Random) -> Outcome:
        truth = chosen.choice(self._truths)
        sent = time.perf_counter()
        outcome = await ask(client, self._varied(truth.request, chosen))
        self._judge(truth, outcome, sent)
        return outcome

    def _varied(self, request: Ask, chosen: random.Random) -> Ask:
        stream = chosen.random() < self._plan.stream_share
        varied = dataclasses.replace(request, stream=stream)
        if chosen.random() >= self._plan.cancel_share:
            return varied
        if stream and chosen.random() < 0.7:
            return dataclasses.replace(varied, cancel_after_pieces=chosen.randint(1, 6))
        return dataclasses.replace(varied, cancel_after_seconds=chosen.uniform(0.001, 0.4))

    def _judge(self, truth: Truth, outcome: Outcome, sent: float) -> None:
        tally = self.tally
        tally.ends[outcome.end] += 1
        if outcome.code is not None:
            tally.codes[outcome.code] += 1
        if outcome.end is End.BROKEN:
            tally.violate(f"{outcome.fault} ({_named(truth.request)})")
        if outcome.end is not End.ANSWERED:
            return
        if self._killed_at is not None and sent > self._killed_at:
            tally.recoveries.append(round(time.perf_counter() - self._killed_at, 2))
            self._killed_at = None
        kind = "streamed" if outcome.first_seconds is not None else "plain"
        tally.checked[f"{kind}, {'seeded' if truth.request.seed is not None else 'greedy'}"] += 1
        tally.tokens += outcome.completion_tokens
        if outcome.output != truth.answer:
            tally.violate(
                f"wrong answer {outcome.output!r}, not {truth.answer!r} ({_named(truth.request)})"
            )


def _named(request: Ask) -> str:
    return f"adapter {request.adapter}, {request.max_new_tokens} tokens, seed {request.seed}"


async def record(
    deployment: Deployment, questions: Sequence[Question], ids: Sequence[str], plan: Plan
) -> tuple[list[Truth], list[str]]:
    """Ask the service everything with nobody else asking; compare with PEFT alone.

    Returns:
        What is right from now on, and where the two disagree.
    """
    chosen = random.Random(plan.seed)
    truths, faults = [], []
    async with new_client(deployment) as client:
        for number, question in enumerate(questions):
            seeded = chosen.random() < plan.seeded_share
            request = Ask(
                messages=question.messages,
                adapter=None if question.adapter is None else ids[question.adapter],
                model=MODEL,
                max_new_tokens=question.max_new_tokens,
            )
            outcome = await _insist(client, request)
            if (outcome.output or "").strip() != question.answer:
                faults.append(f"alone {outcome.output!r}, PEFT {question.answer!r}")
            truths.append(Truth(request=request, answer=outcome.output or ""))
            if seeded:
                request = dataclasses.replace(request, temperature=0.8, seed=number)
                outcome = await _insist(client, request)
                truths.append(Truth(request=request, answer=outcome.output or ""))
    return truths, faults


async def _insist(client: httpx.AsyncClient, request: Ask) -> Outcome:
    for _ in range(60):
        outcome = await ask(client, request)
        if outcome.end is End.ANSWERED:
            return outcome
        await asyncio.sleep(1.0)
    raise RuntimeError(f"the service does not answer: {outcome}")


async def warm_up(deployment: Deployment, truths: Sequence[Truth], plan: Plan) -> None:
    """Let the largest crowd come twice: pools of connections have their size from then on."""
    size = plan.crowd_size + plan.num_callers
    async with new_client(deployment) as client:
        for _ in range(2):
            await asyncio.gather(
                *(ask(client, truths[n % len(truths)].request) for n in range(size))
            )


def at_rest(deployment: Deployment) -> dict[str, Any]:
    """What is held when nobody asks, once the last request has been forgotten."""
    wait_until(lambda: not _waiting(deployment), seconds=30.0)
    time.sleep(3.0)
    usages = {name: deployment.usage(name) for name in WATCHED}
    return {
        "usage": {name: dataclasses.asdict(one) for name, one in usages.items() if one},
        "descriptors": {name: deployment.descriptors(name) for name in WATCHED},
        "mailbox": dict(Counter(key.split(":")[2] for key in deployment.mailbox_keys())),
        "waiting": _waiting(deployment),
    }


def _waiting(deployment: Deployment) -> list[str]:
    """Keys of the mailbox in which a request still waits or runs.

    Answers that nobody fetched and notes of those who went away expire by themselves; a key
    without an end is never forgotten.
    """
    return [
        key
        for key, words in deployment.mailbox_keys().items()
        if "-1 s left" in words or any(f":{kind}:" in key for kind in _HELD)
    ]


def verdict(
    soak: Soak, plan: Plan, before: dict[str, Any], after: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Leaks by process, and every violation in words."""
    faults = list(soak.tally.violations)
    leaks: dict[str, Any] = {}
    for name in WATCHED:
        samples = [s for s in soak.watch.samples if s.name == name]
        leaks[name] = growth(samples, warm_seconds=plan.warm_seconds)
        if leaks[name] is not None and leaks[name]["grew"]:
            faults.append(f"{name} grew: {leaks[name]}")
        first, last = (part["usage"].get(name) for part in (before, after))
        if first is None or last is None:
            faults.append(f"{name} does not run")
            continue
        opened = open_too_many(
            before["descriptors"][name],
            after["descriptors"][name],
            num_callers=plan.crowd_size + plan.num_callers,
        )
        faults.extend(f"{name}, {words}" for words in opened)
    faults.extend(f"left in the mailbox: {key}" for key in after["waiting"])
    return leaks, faults


def run(plan: Plan, *, logs: Path | None = None) -> dict[str, Any]:
    """Prepare, soak, judge."""
    with tempfile.TemporaryDirectory() as folder:
        sources = write_varied_adapters(Path(folder, "adapters"), num_adapters=plan.num_adapters)
        asked = make_questions(
            plan.num_adapters,
            num_each=plan.num_each,
            max_new_tokens=plan.max_new_tokens,
            seed=plan.seed,
        )
        questions = answer_alone(asked, sources)
        with running_service(Path(folder)) as deployment:
            ids = deployment.add_adapters(sources)
            truths, faults = asyncio.run(record(deployment, questions, ids, plan))
            asyncio.run(warm_up(deployment, truths, plan))
            before = at_rest(deployment)
            soak = Soak(deployment, truths, plan)
            asyncio.run(soak.run())
            alive = wait_until(lambda: deployment.pid(INFERENCE) is not None, seconds=60.0)
            after = at_rest(deployment)
            restarts = {name: deployment.restarts(name) for name in WATCHED}
            errors = deployment.logged_errors()
            if logs is not None:
                keep_logs(deployment, logs)
    leaks, found = verdict(soak, plan, before, after)
    faults += found
    if not alive:
        faults.append("the inference worker did not come back")
    faults.extend(f"{number} errors in the log of {n}" for n, number in errors.items() if number)
    if restarts[INFERENCE] != len(soak.tally.kills):
        faults.append(f"{restarts[INFERENCE]} restarts after {len(soak.tally.kills)} kills")
    if any(restarts[name] for name in WATCHED if name != INFERENCE):
        faults.append(f"somebody else died: {restarts}")
    tally = soak.tally
    return {
        "plan": dataclasses.asdict(plan),
        "num_questions": len(questions),
        "num_different_answers": len({truth.answer for truth in truths}),
        "ends": dict(tally.ends),
        "codes": dict(tally.codes),
        "checked": dict(tally.checked),
        "completion_tokens": tally.tokens,
        "kills": tally.kills,
        "recovery_seconds": tally.recoveries,
        "restarts": restarts,
        "logged_errors": errors,
        "leaks": leaks,
        "at_rest_before": before,
        "at_rest_after": after,
        "samples": soak.watch.to_json(),
        "violations": faults,
    }


def main() -> int:
    """Soak, print, write; 1 on any violation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="where to keep the processes' logs")
    parser.add_argument("--name", default="soak", help="of the result")
    options = parser.parse_args()
    plan = Plan(seconds=60.0 * options.minutes, seed=options.seed)
    result = run(plan, logs=options.logs)
    for name in ("ends", "codes", "checked", "kills", "recovery_seconds", "leaks"):
        print(f"{name}: {result[name]}")
    print(write_result(f"serving/{options.name}", result))
    for fault in result["violations"]:
        print(f"VIOLATION: {fault}")
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
