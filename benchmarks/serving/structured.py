"""What a token costs more when the answer is held to a schema.

    python -m benchmarks.serving.structured # benchmarks/results/serving/structured.json

Text models with random weights (8 layers of SmolVLM's kind, 384 wide) and vocabularies of real
sizes. The model is small on purpose: its step is short, so that masks have little time beside it
and whatever they cost shows. Greedy answers of one length, free and held, in batches of 1, 4 and
16; the arms take turns. Beside that, without a model: how long the vocabulary takes to read, a
schema to compile, and a token's mask to be prepared, added and gone past.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import paired_ratio, write_result
from benchmarks.serving.ours import ObservedEngine, batch
from benchmarks.serving.prompts import text_prompt
from benchmarks.serving.turns import ratio, take_turns, to_json
from benchmarks.serving.vocabulary import SPECIAL, build_tokenizer
from grit_core.grammars import json_schema_grammar
from grit_core.serving.constraint import (
    Constraint,
    build_mask_table,
    expand_masks,
    pack_masks,
)
from grit_core.serving.grammar_tokenizer import GrammarTokenizer, copy_backend

VOCABULARIES: Final = (49_152, 151_936)
BATCHES: Final = (1, 4, 16)
NUM_TOKENS: Final = 16
NUM_FOLLOWED: Final = 600
END: Final = 1

SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "minItems": 1_000_000,  # no answer ends before its last token
    "items": {
        "type": "object",
        "properties": {
            "article": {"type": "string", "maxLength": 12},
            "quantity": {"type": "integer", "minimum": 0, "maximum": 999},
            "sold": {"type": "string", "format": "date"},
            "state": {"enum": ["new", "used", None]},
        },
        "required": ["article", "quantity", "sold", "state"],
        "additionalProperties": False,
    },
}


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a model that never ends an answer by itself."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0.0  # a logit of 0 is never the largest
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare(folder: Path, *, num_rounds: int) -> dict[str, Any]:
    """Measure free and held answers in turn, for each size of a batch."""
    engine = ObservedEngine(max_batch=max(BATCHES), prefix_cache_bytes=0)
    grammar = json_schema_grammar(SCHEMA)

    def arm(num_rows: int, held: str, cpu: list[float]) -> Callable[[int], float]:
        def measure(number: int) -> float:
            prompts = [text_prompt((number + 1) * 100 + row) for row in range(num_rows)]
            run = batch(engine, folder, prompts, num_tokens=NUM_TOKENS, grammar=held)
            cpu.append(run.decode_cpu_seconds * num_rows / run.num_decoded)
            return run.decode_seconds * num_rows / run.num_decoded

        return measure

    found: dict[str, Any] = {}
    for num_rows in BATCHES:
        cpu: dict[str, list[float]] = {"held": [], "free": []}
        arms = {
            "held": arm(num_rows, grammar, cpu["held"]),
            "free": arm(num_rows, "", cpu["free"]),
        }
        for name, one in arms.items():
            one(-1)
            cpu[name].clear()
        turns = take_turns(arms, num_rounds=num_rounds, say=print)
        found[str(num_rows)] = {
            "held_over_free": ratio(turns["held"], turns["free"]),
            "held_over_free_cpu": paired_ratio(cpu["held"], cpu["free"]),
            "turns": to_json(turns),
        }
    engine.close()
    return found


def follow(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Time the parts by themselves, along answers whose tokens are drawn among the allowed."""
    started = time.process_time()
    grammars = GrammarTokenizer(copy_backend(tokenizer), eos_token_id=END)
    read_seconds = time.process_time() - started
    grammar = json_schema_grammar(SCHEMA)
    started = time.process_time()
    grammars.compile(grammar)
    compile_seconds = time.process_time() - started
    draw = np.random.default_rng(0)
    spent: dict[str, list[float]] = {"prepare": [], "apply": [], "accept": []}
    constraint = Constraint(grammars.compile(grammar), grammars, [END])
    table = build_mask_table(torch.device("cpu"))
    for _ in range(NUM_FOLLOWED):
        logits = torch.randn(1, len(tokenizer))
        spent["apply"].append(_seconds(lambda: _take_out(logits, constraint, table)))  # noqa: B023 - at once
        token = int(draw.choice(logits.isfinite().nonzero()[:, 1].numpy()))
        spent["accept"].append(_seconds(lambda: constraint.accept(token)))  # noqa: B023 - at once
        spent["prepare"].append(_seconds(constraint.prepare))
    if constraint.fault is not None:
        raise constraint.fault
    return {
        "read_seconds": read_seconds,
        "compile_seconds": compile_seconds,
        **{
            f"{name}_microseconds": {
                "median": 1e6 * float(np.median(each)),
                "p99": 1e6 * float(np.quantile(each, 0.99)),
                "mean": 1e6 * float(np.mean(each)),
            }
            for name, each in spent.items()
        },
    }


def _take_out(logits: torch.Tensor, constraint: Constraint, table: torch.Tensor) -> None:
    num_logits = logits.shape[1]
    masks = torch.from_numpy(pack_masks([constraint], num_logits=num_logits))
    logits.add_(expand_masks(masks.view(torch.uint8), table, num_logits=num_logits))


def _seconds(act: Callable[[], object]) -> float:
    started = time.thread_time()
    act()
    return time.thread_time() - started


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vocabularies: dict[str, Any] = {}
    for size in VOCABULARIES:
        tokenizer = build_tokenizer(size)
        with tempfile.TemporaryDirectory() as folder:
            source = write_model(Path(folder) / "model", tokenizer)
            batches = compare(source, num_rounds=options.rounds)
        vocabularies[str(size)] = {"parts": follow(tokenizer), "batches": batches}
        for num_rows, one in batches.items():
            held = one["held_over_free"]
            print(
                f"{size} tokens, {num_rows} rows: {1e3 * held['above_median']:.2f} ms held,"
                f" {1e3 * held['below_median']:.2f} ms free; {held['median_ratio']:.3f}"
                f" ({held['low']:.3f}, {held['high']:.3f}); processor time"
                f" {one['held_over_free_cpu']['median_ratio']:.3f}"
            )
        print(vocabularies[str(size)]["parts"])
    result = {"options": vars(options), "vocabularies": vocabularies}
    print(write_result("serving/structured", result))


if __name__ == "__main__":
    main()
