"""Whether a mixed batch answers as each adapter alone and as each adapter merged.

    python -m benchmarks.serving.exactness  # benchmarks/results/serving/exactness.json

Every row of a mixed batch is set against the base model with that row's adapter added into its
weights, under plain transformers: the logits of every token that was chosen, from one pass over the
whole sequence without a cache, and the tokens of a greedy `generate`. And against our engine with
the same requests one at a time. Two subjects: SmolVLM-256M's shape with sixteen adapters of rank 16
on the text model, and the digits VLM with adapters of several ranks on several towers, images, and
a row without an adapter.
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.measure import write_result
from benchmarks.serving.adapters import BaseShape, write_adapters
from benchmarks.serving.bases import DIGITS, write_smolvlm
from benchmarks.serving.ours import ObservedEngine
from benchmarks.serving.peers import Peer
from benchmarks.serving.prompts import Prompt, text_prompt
from benchmarks.serving.questions import digit_conversations, write_varied_adapters
from grit_core.artifacts import CONFIG, WEIGHTS
from grit_core.generation import AdapterSource, GenerationRequest

TOLERANCE: Final = 1e-4
"""Of a logit, in float32."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request of a batch."""

    prompt: Prompt
    adapter: AdapterSource | None
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was written."""

    tokens: list[int]
    logits: Tensor
    """[tokens, vocabulary]"""


@contextmanager
def merged_in(model: nn.Module, adapter: AdapterSource | None) -> Iterator[None]:
    """Have an adapter in a model's weights for a while; the weights come back bit by bit."""
    if adapter is None:
        yield
        return
    settings = json.loads((adapter.folder / CONFIG).read_text())
    scale = settings["lora_alpha"] / settings["r"]
    lora = load_file(adapter.folder / WEIGHTS)
    names = {key.partition(".lora_")[0] for key in lora}
    kept: dict[nn.Parameter, Tensor] = {}
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
            kept[weight] = weight.clone()
            weight += scale * (lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"])
        try:
            yield
        finally:
            for weight, golden in kept.items():
                weight.copy_(golden)


def answers(engine: ObservedEngine, source: Path, rows: Sequence[Row]) -> list[Answer]:
    """Ask our engine for all rows at once, each with an adapter of its own."""
    engine.forget()
    failures: list[Exception] = []

    def one(row: Row) -> None:
        request = GenerationRequest(chat=row.prompt.chat, max_new_tokens=row.num_tokens)
        try:
            engine.generate(str(source), request, adapter=row.adapter)
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=one, args=(row,)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    # Rows come in any order; no two have the same adapter.
    by_adapter = {ticket.scope: ticket for ticket in engine.tickets}
    tickets = [by_adapter[row.adapter.id if row.adapter else None] for row in rows]
    return [Answer(tokens=t.ids, logits=torch.stack(engine.logits[t])) for t in tickets]


def compare(source: Path, rows: Sequence[Row], *, max_adapters: int) -> dict[str, Any]:
    """Set a mixed batch against each row alone and against each row merged."""
    engine = ObservedEngine(keep_logits=True, max_adapters=max_adapters, max_batch=len(rows))
    mixed = answers(engine, source, rows)
    most_shared = max(step.num_rows for step in engine.steps)
    engine.close()
    # An engine of its own: nothing of the mixed batch is in its caches.
    single = ObservedEngine(keep_logits=True, max_adapters=max_adapters, max_batch=1)
    alone = [answers(single, source, [row])[0] for row in rows]
    single.close()
    peer = Peer(source)
    compared = [
        _against_merged(peer, row, one, lone)
        for row, one, lone in zip(rows, mixed, alone, strict=True)
    ]
    return {
        "num_rows": len(rows),
        "most_rows_in_a_step": most_shared,
        "num_tokens": sum(len(one.tokens) for one in mixed),
        "num_different_answers": len({tuple(one.tokens) for one in mixed}),
        "largest_logit": max(row["largest_logit"] for row in compared),
        "largest_difference_to_merged": max(row["difference_to_merged"] for row in compared),
        "largest_difference_to_alone": max(row["difference_to_alone"] for row in compared),
        "rows_with_tokens_of_merged": sum(row["same_as_merged"] for row in compared),
        "rows_with_tokens_of_alone": sum(row["same_as_alone"] for row in compared),
        "rows": compared,
    }


def _against_merged(peer: Peer, row: Row, mixed: Answer, alone: Answer) -> dict[str, Any]:
    inputs = peer.inputs([row.prompt])
    num_prompt = inputs["input_ids"].shape[1]
    whole = dict(inputs)
    written = torch.tensor([mixed.tokens])
    whole["input_ids"] = torch.cat([inputs["input_ids"], written], 1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with merged_in(peer.model, row.adapter):
        logits = peer.logits(whole)[0, num_prompt - 1 : -1]
        greedy = peer.batch([row.prompt], num_tokens=row.num_tokens).tokens[0]
    leads = logits.topk(2).values
    same = min(len(mixed.tokens), len(alone.tokens))
    return {
        "adapter": None if row.adapter is None else row.adapter.id,
        "largest_logit": float(logits.abs().max()),
        "smallest_lead": float((leads[:, 0] - leads[:, 1]).min()),
        "difference_to_merged": float((mixed.logits - logits).abs().max()),
        "difference_to_alone": float((mixed.logits[:same] - alone.logits[:same]).abs().max()),
        "same_as_merged": mixed.tokens == greedy,
        "same_as_alone": mixed.tokens == alone.tokens,
    }


def smolvlm_rows(folder: Path, *, num_adapters: int, num_tokens: int) -> tuple[Path, list[Row]]:
    """SmolVLM's shape: text prompts, rank 16 on the text model."""
    source = write_smolvlm(folder / "smolvlm")
    made = write_adapters(
        folder / "adapters", BaseShape.of(source), num_adapters=num_adapters, rank=16
    )
    prompts = [text_prompt(number, num_words=3 + number % 5) for number in range(num_adapters)]
    pairs = zip(prompts, made, strict=True)
    return source, [Row(prompt=p, adapter=a, num_tokens=num_tokens) for p, a in pairs]


def digits_rows(folder: Path, *, num_adapters: int, num_tokens: int) -> tuple[Path, list[Row]]:
    """The digits VLM: images, several ranks and towers, and the base model among them."""
    made = write_varied_adapters(folder / "varied", num_adapters=num_adapters)
    images = [Prompt(messages) for messages in digit_conversations()[:num_adapters]]
    rows = [
        Row(
            prompt=images[number] if number % 3 else text_prompt(number, num_words=1 + number),
            adapter=adapter,
            num_tokens=num_tokens - number % 4,
        )
        for number, adapter in enumerate(made)
    ]
    return DIGITS, [*rows, Row(prompt=images[0], adapter=None, num_tokens=num_tokens)]


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    result: dict[str, Any] = {"tolerance": TOLERANCE}
    for name, make in (("digits", digits_rows), ("smolvlm", smolvlm_rows)):
        with tempfile.TemporaryDirectory() as folder:
            source, rows = make(
                Path(folder), num_adapters=options.adapters, num_tokens=options.tokens
            )
            result[name] = compare(source, rows, max_adapters=options.adapters)
        print(name, {key: value for key, value in result[name].items() if key != "rows"})
    print(write_result("serving/exactness", result))


if __name__ == "__main__":
    main()
