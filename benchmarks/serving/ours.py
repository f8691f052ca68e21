"""Our engine, with a look at its steps: many callers at once, as the service's worker asks it."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.serving.peers import Run
from benchmarks.serving.prompts import Prompt
from grit_core.generation import AdapterSource, GenerationEngine, GenerationRequest
from grit_core.serving.batch import Batch
from grit_core.serving.resident_model import Prefilled
from grit_core.serving.ticket import Ticket


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a batch."""

    num_rows: int
    seconds: float
    cpu_seconds: float
    """Of all threads."""


class ObservedEngine(GenerationEngine):
    """The engine as it is; its steps are timed and its requests kept until they are looked at."""

    def __init__(self, *, keep_logits: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.steps: list[Step] = []
        self.tickets: list[Ticket] = []
        self.logits: dict[Ticket, list[Tensor]] = {}
        """Of every token that was chosen, when asked to keep them."""
        self._keep_logits = keep_logits

    def forget(self) -> None:
        """Forget what was seen."""
        self.steps, self.tickets, self.logits = [], [], {}

    def _submit(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)
        if self._keep_logits:
            self._listen(ticket)
        super()._submit(ticket)

    def _listen(self, ticket: Ticket) -> None:
        begin, seen = ticket.begin, self.logits.setdefault(ticket, [])

        def begin_and_keep(prefilled: Prefilled) -> bool:
            seen.append(prefilled.logits_V.clone())
            return begin(prefilled)

        ticket.begin = begin_and_keep

    def _keep(self, batch: Batch) -> None:
        """Keep the logits of a batch's next step."""
        tickets, resident = list(batch.tickets), batch.resident

        def step(*args: Any, **options: Any) -> Tensor:
            del resident.step  # the class's own again
            logits: Tensor = resident.step(*args, **options)
            for ticket, of_row in zip(tickets, logits, strict=True):
                self.logits[ticket].append(of_row.clone())
            return logits

        resident.step = step

    def _step(self, batch: Batch) -> None:
        num_rows = len(batch.tickets)
        if self._keep_logits:
            self._keep(batch)
        started, cpu_started = time.perf_counter(), time.process_time()
        super()._step(batch)
        spent, cpu_spent = time.perf_counter() - started, time.process_time() - cpu_started
        self.steps.append(Step(num_rows=num_rows, seconds=spent, cpu_seconds=cpu_spent))


def batch(
    engine: ObservedEngine,
    source: Path,
    prompts: Sequence[Prompt],
    *,
    num_tokens: int,
    adapters: Sequence[AdapterSource | None] | None = None,
    grammar: str = "",
) -> Run:
    """Ask for all prompts at once, a thread each, and wait for all.

    Only steps of the whole batch count as decoding: the first rows to come may be a step ahead.

    Raises:
        RuntimeError: An answer ended early, or rows never shared a step.
    """
    chosen = adapters or [None] * len(prompts)
    engine.forget()
    failures: list[Exception] = []

    def one(prompt: Prompt, adapter: AdapterSource | None) -> None:
        request = GenerationRequest(chat=prompt.chat, max_new_tokens=num_tokens, grammar=grammar)
        try:
            engine.generate(str(source), request, adapter=adapter)
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            failures.append(error)

    threads = [
        threading.Thread(target=one, args=pair) for pair in zip(prompts, chosen, strict=True)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failures:
        raise failures[0]
    full = [step for step in engine.steps if step.num_rows == len(prompts)]
    by_words = {tuple(ticket.prompt_ids): ticket for ticket in engine.tickets}
    if not full or any(len(ticket.ids) != num_tokens for ticket in engine.tickets):
        raise RuntimeError("the rows did not share their steps to the last token")
    return Run(
        seconds=seconds,
        decode_seconds=sum(step.seconds for step in full),
        decode_cpu_seconds=sum(step.cpu_seconds for step in full),
        num_decoded=sum(step.num_rows for step in full),
        tokens=[by_words[_ids(engine, source, prompt)].ids for prompt in prompts],
    )


def _ids(engine: ObservedEngine, source: Path, prompt: Prompt) -> tuple[int, ...]:
    """A prompt's tokens, by which its row is found: rows come in any order."""
    encoder = next(
        t.resident.encoder
        for t in engine.tickets
        if t.resident is engine._bases[str(source)]  # noqa: SLF001 - a look inside
    )
    encoded = encoder.encode_prompt(prompt.chat.messages, prompt.images())
    return tuple(encoded["input_ids"][0].tolist())
