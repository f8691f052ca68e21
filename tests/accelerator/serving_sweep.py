"""Let memory run out at every allocation of serving, and compare all later answers.

    python -m tests.accelerator.serving_sweep            # every point: some hours
    python -m tests.accelerator.serving_sweep --every 20 join step

Each kind of point is a state of an engine on the simulated device and some requests that come at
once. At a point, memory runs out at the n-th allocation that these cause, once or several times.
Every request must then be answered as by an engine on the CPU that never failed, or end with
`torch.OutOfMemoryError`; and so must requests of all adapters and of the base model after it.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Final

import pytest
import torch

from grit_core.generation import AdapterSource, GenerationEngine, GenerationRequest
from grit_core.records import parse_prompt
from tests.accelerator import Accelerator
from tests.accelerator.fixtures import present
from tests.grit_core.serving.adapters import EVERYWHERE, adapter_source
from tests.tiny_models import png_data_url, tiny_causal_folder, tiny_vlm_folder

FAILURES: Final = (1, 2, 9, 10**6)
"""Allocations in a row that fail: the second try finds memory, or does not."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request, with whom it is for."""

    request: GenerationRequest
    adapter: AdapterSource | None = None
    source: str


def question(
    source: str,
    text: str,
    *,
    adapter: AdapterSource | None = None,
    image: int | None = 3,
    answered: str = "",
    **options: object,
) -> Question:
    """A question about an image, or about none; it goes on from an answer where one is given."""
    content: list[dict[str, object]] = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": png_data_url(image)}})
    messages: list[dict[str, object]] = [{"role": "user", "content": content}]
    if answered:
        messages += [
            {"role": "assistant", "content": answered},
            {"role": "user", "content": "Are you sure?"},
        ]
    request = GenerationRequest(chat=parse_prompt(messages), **{"max_new_tokens": 4, **options})  # type: ignore[arg-type]
    return Question(request=request, adapter=adapter, source=source)


def ask(engine: GenerationEngine, questions: Sequence[Question]) -> list[str | Exception]:
    """Ask all at once, in their order; return the texts and what was raised."""
    return ask_armed(engine, questions, arm=lambda: None)


def ask_armed(
    engine: GenerationEngine, questions: Sequence[Question], *, arm: Callable[[], None]
) -> list[str | Exception]:
    """Ask all before the engine's thread begins; `arm` is called just then."""

    def one(asked: Question) -> str | Exception:
        try:
            return engine.generate(asked.source, asked.request, adapter=asked.adapter).text
        except Exception as error:  # noqa: BLE001 - it is compared
            return error

    if len(questions) == 1:  # its model is loaded in the thread that asks
        arm()
        return [one(questions[0])]
    with ThreadPoolExecutor(len(questions)) as pool:
        found = []
        with engine._turn:
            for number, asked in enumerate(questions, 1):
                found.append(pool.submit(one, asked))
                while engine.stats().num_waiting < number and not found[-1].done():
                    time.sleep(0.001)  # the other threads need the interpreter
            arm()
        return [each.result() for each in found]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of point."""

    prepare: list[list[Question]]
    """Asked before, one group after the other."""
    asked: list[Question]
    options: dict[str, int] = field(default_factory=dict)
    """Of the engine."""
    fresh: bool = False
    """Each point needs an engine of its own."""


class Sweep:
    """Models and adapters, the kinds of points, and the answers that are right."""

    def __init__(self, folder: Path) -> None:
        """Write the models and the adapters."""
        self.base = base = str(tiny_vlm_folder(folder))
        self.other = str(tiny_causal_folder(folder))
        a, b, c = self.adapters = [
            adapter_source(base, folder, seed=1, rank=4, target=["q_proj", "v_proj"], size=1.0),
            adapter_source(base, folder, seed=2, rank=8, target=EVERYWHERE, size=0.5),
            adapter_source(base, folder, seed=3, rank=2, target=["v_proj"], size=2.0),
        ]
        long = "Which digit is this, and how sure are you of it? "
        self.after = [
            question(base, "Which digit?", adapter=a),
            question(base, "Which digit?"),
            question(base, "Which digit?", adapter=b),
        ]
        self.after_others = [
            question(base, "And now?", adapter=c, image=None),
            question(base, "And now?", adapter=b, image=None),
        ]
        first = question(base, long, adapter=a)
        answered = self._on_cpu([first])[0]
        together = [
            question(base, long, adapter=a, max_new_tokens=40),
            question(base, "What?", adapter=b, image=None, temperature=1.5, seed=7),
            question(
                base, "Why?", image=None, max_new_tokens=12, temperature=0.8, top_p=0.9, seed=1
            ),
        ]
        alone = {"prefix_cache_bytes": 0}
        self.kinds = {
            "load": Kind(prepare=[], asked=[question(base, "What?", max_new_tokens=1)], fresh=True),
            "second base": Kind(
                prepare=[[question(base, "What?")]],
                asked=[question(self.other, "What?", image=None, max_new_tokens=1)],
                fresh=True,
            ),
            "prefill": Kind(
                prepare=[[question(base, "Hm?", adapter=b)]],
                asked=[question(base, long, adapter=b, image=5, max_new_tokens=1)],
            ),
            "images": Kind(
                prepare=[[question(base, "Hm?", image=5, max_new_tokens=1)]],
                asked=[question(base, long, image=5, max_new_tokens=1)],
                options=alone,
            ),
            "prefix": Kind(
                prepare=[[first]],
                asked=[question(base, long, adapter=a, answered=str(answered), max_new_tokens=1)],
            ),
            "entry": Kind(
                prepare=[[question(base, "Hm?", adapter=c, image=None)]],
                asked=[question(base, "What?", adapter=b, image=None, max_new_tokens=1)],
                fresh=True,
            ),
            "eviction": Kind(
                prepare=[
                    [question(base, "Hm?", adapter=c, image=None)],
                    [question(base, "Hm?", adapter=b, image=None)],
                ],
                asked=[question(base, "What?", adapter=a, image=None, max_new_tokens=1)],
            ),
            "join": Kind(
                prepare=[],
                asked=[question(base, "Hm?", adapter=a, max_new_tokens=2) for a in (a, b, None)],
            ),
            "step": Kind(prepare=[], asked=together),
            "sampling": Kind(
                prepare=[],
                asked=[question(base, "Hm?", image=None, temperature=2.0, top_p=0.9, seed=5)],
            ),
        }
        self._expected: dict[str, list[str | Exception]] = {}

    def _on_cpu(self, questions: Sequence[Question]) -> list[str | Exception]:
        engine = GenerationEngine(prefix_cache_bytes=0)
        try:
            return [answer for each in questions for answer in ask(engine, [each])]
        finally:
            engine.close()

    def expected(self, name: str, questions: Sequence[Question]) -> list[str | Exception]:
        """What an engine on the CPU answers, to one after the other."""
        if name not in self._expected:
            self._expected[name] = self._on_cpu(questions)
        return self._expected[name]

    def engine(self, kind: Kind) -> GenerationEngine:
        """A new engine on the device."""
        bounds = {"max_adapters": 2, "max_batch": 4, **kind.options}
        return GenerationEngine(device="sim", **bounds)  # type: ignore[arg-type]

    def prepare(self, engine: GenerationEngine, kind: Kind) -> None:
        """Bring an engine into the state in which the requests come."""
        for resident in engine._bases.values():
            resident.drop_caches()
        for group in kind.prepare:
            for answer in ask(engine, group):
                assert isinstance(answer, str), answer

    def run(
        self, card: Accelerator, name: str, *, every: int = 1, first: int = 1
    ) -> Iterator["Point"]:
        """Yield the points of a kind.

        Args:
            card: The device.
            name: Of the kind.
            every: Of so many points one.
            first: The first one.
        """
        kind = self.kinds[name]
        engine = self.engine(kind)
        try:
            self.prepare(engine, kind)
            found = ask_armed(engine, kind.asked, arm=lambda: card.run_out_at(0))
            total = card.num_allocations
            expected = self.expected(name, kind.asked)
            assert found == expected, (name, found, expected)
            for allocation, times in zip(range(first, total + 1, every), cycle(FAILURES)):
                if kind.fresh:
                    engine.close()
                    engine = self.engine(kind)
                self.prepare(engine, kind)
                yield self._point(card, engine, name, (allocation, times))
        finally:
            card.run_out_at(0)
            engine.close()

    def _point(
        self, card: Accelerator, engine: GenerationEngine, name: str, where: tuple[int, int]
    ) -> "Point":
        kind = self.kinds[name]
        refused = card.num_refusals
        found = ask_armed(engine, kind.asked, arm=lambda: card.run_out_at(where[0], times=where[1]))
        refused = card.num_refusals - refused
        card.run_out_at(0)
        wrong = [
            f"{got!r} and not {right!r}"
            for got, right in zip(found, self.expected(name, kind.asked), strict=True)
            if got != right and not isinstance(got, torch.OutOfMemoryError)
        ]
        later = [*self.after, *self.after_others]
        rights = self.expected("after", later)
        gots = ask(engine, self.after) + ask(engine, self.after_others)
        wrong += [
            f"afterwards {got!r} and not {right!r}"
            for got, right in zip(gots, rights, strict=True)
            if got != right
        ]
        stats = engine.stats()
        if stats.num_active or stats.num_waiting or any(held(engine)):
            wrong.append(f"held afterwards: {stats}, {list(held(engine))}")
        return Point(
            kind=name,
            allocation=where[0],
            times=where[1],
            refused=refused,
            failed=sum(isinstance(each, torch.OutOfMemoryError) for each in found),
            wrong=wrong,
        )


def held(engine: GenerationEngine) -> Iterator[int]:
    """Count the users of slots and of models; all are 0 when nothing is asked."""
    for resident in engine._bases.values():
        yield resident.in_flight
        yield from resident.slots._uses


@dataclass(frozen=True, kw_only=True)
class Point:
    """What became of the requests."""

    kind: str
    allocation: int
    times: int
    refused: int
    """Allocations that ran out."""
    failed: int
    """Requests that ended with `torch.OutOfMemoryError`."""
    wrong: list[str]
    """What is not as it should be."""


@contextmanager
def device() -> Iterator[Accelerator]:
    """Give this process the simulated device."""
    with pytest.MonkeyPatch.context() as patch, present(patch) as card:
        yield card


def main() -> int:
    """Run the sweep; the exit status is 1 where an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    options = parser.parse_args()
    num_wrong = 0
    with tempfile.TemporaryDirectory() as folder, device() as card:
        sweep = Sweep(Path(folder))
        gc.collect()
        gc.freeze()  # each failure collects: what is there now is no part of it
        for name in options.kinds or sweep.kinds:
            num_points = num_failed = num_retried = 0
            for point in sweep.run(card, name, every=options.every, first=options.first):
                num_points += 1
                num_failed += point.failed > 0
                num_retried += point.failed == 0 and point.refused > 0
                if point.wrong:
                    num_wrong += 1
                    print(point, flush=True)  # noqa: T201 - a command
            print(  # noqa: T201 - likewise
                f"{name}: {num_points} points, {num_retried} answered after a second try,"
                f" {num_failed} with an error",
                flush=True,
            )
    print(f"{num_wrong} points with a wrong answer")  # noqa: T201 - likewise
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
