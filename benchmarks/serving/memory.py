"""Memory and latency as the number of registered adapters grows from 1 to 1,000.

    python -m benchmarks.serving.memory                  # benchmarks/results/serving/memory.json
    python -m benchmarks.serving.memory --base smolvlm   # .../memory_smolvlm.json

One service, one base model (the digits VLM with questions about images, or SmolVLM-256M's shape
with questions in words and adapters of rank 1, of which a thousand fit on a disk); adapters are
added between the measurements. Requests come one after another, for adapters drawn by Zipf's law
over all that are registered: the first is asked for twice as often as the second. No question comes
twice, and the caches of images and keys are small and full from the start, so that nothing but the
number of adapters differs. The slopes are those of a straight line through the logarithms.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.measure import write_result
from benchmarks.serving.adapters import BaseShape, write_adapters
from benchmarks.serving.bases import DIGITS, write_smolvlm
from benchmarks.serving.deployment import API, INFERENCE, MODEL, Deployment, running_service
from benchmarks.serving.load import new_client, quantile
from benchmarks.serving.prompts import text_prompt
from benchmarks.serving.questions import digit_conversations
from benchmarks.serving.traffic import Ask, End, ask
from grit_core.generation import AdapterSource

COUNTS: Final = (1, 10, 100, 1000)
NUM_CONTENTS: Final = 32
MAX_NEW_TOKENS: Final = 8
SMALL_CACHES: Final = {
    "GRIT_INFER_IMAGE_CACHE_BYTES": str(1024**2),
    "GRIT_INFER_PREFIX_CACHE_BYTES": str(1024**2),
}
"""Full after some requests: by default they grow with every question, up to 256 MiB each."""
DIGIT_FILES: Final = ("rotated-inverted-train", "upright-heldout", "rotated-inverted-heldout")


def zipf(num_adapters: int, num_requests: int, *, seed: int) -> list[int]:
    """Draw adapters of which number k is asked for in proportion to 1 / (k + 1)."""
    weights = [1.0 / (place + 1) for place in range(num_adapters)]
    return random.Random(seed).choices(range(num_adapters), weights, k=num_requests)


def slope(counts: Sequence[float], values: Sequence[float]) -> float:
    """Of a straight line through the logarithms."""
    return float(np.polyfit(np.log(counts), np.log(values), 1)[0])


async def latencies(
    deployment: Deployment,
    adapters: Sequence[str],
    conversations: Iterator[list[dict[str, Any]]],
    *,
    model: str,
    num_requests: int,
    seed: int,
) -> dict[str, Any]:
    """Ask one after another; what a request takes, and what the processes hold at the end."""
    drawn = zipf(len(adapters), num_requests, seed=seed)
    seconds, processor = [], _processor_seconds(deployment)
    async with new_client(deployment) as client:
        for place in drawn:
            request = Ask(
                messages=next(conversations),
                adapter=adapters[place],
                model=model,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            outcome = await ask(client, request)
            if outcome.end is not End.ANSWERED:
                raise RuntimeError(f"not answered: {outcome}")
            seconds.append(outcome.seconds)
    usage = {name: deployment.usage(name) for name in (API, INFERENCE)}
    return {
        "num_registered": len(adapters),
        "num_requests": num_requests,
        "num_different": len(set(drawn)),
        "mean_seconds": float(np.mean(seconds)),
        "p50_seconds": quantile(seconds, 0.5),
        "p99_seconds": quantile(seconds, 0.99),
        "worker_cpu_seconds_per_request": (_processor_seconds(deployment) - processor)
        / num_requests,
        **{f"{name}_resident_bytes": one.resident_bytes for name, one in usage.items() if one},
    }


def _processor_seconds(deployment: Deployment) -> float:
    import psutil  # noqa: PLC0415 - beside its only use

    pid = deployment.pid(INFERENCE)
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def grow(
    deployment: Deployment,
    sources: Sequence[AdapterSource],
    conversations: Iterator[list[dict[str, Any]]],
    *,
    model: str,
    counts: Sequence[int],
    num_requests: int,
) -> list[dict[str, Any]]:
    """Measure with more and more adapters."""
    ids: list[str] = []
    found: list[dict[str, Any]] = []
    for number, count in enumerate(counts):
        started = time.perf_counter()
        ids += deployment.add_adapters(sources[len(ids) : count], model=model)
        print(f"{count} registered in {time.perf_counter() - started:.1f} s")
        # Once to reach a steady state (the disk cache, the slots), once to measure.
        for seed in (2 * number, 2 * number + 1):
            level = asyncio.run(
                latencies(
                    deployment,
                    ids,
                    conversations,
                    model=model,
                    num_requests=num_requests,
                    seed=seed,
                )
            )
        found.append(level)
        print(
            f"  p50 {level['p50_seconds'] * 1e3:.1f} ms,"
            f" worker {level[f'{INFERENCE}_resident_bytes'] / 1e6:.0f} MB"
        )
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", choices=("digits", "smolvlm"), default="digits")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--counts", type=int, nargs="*", default=list(COUNTS))
    options = parser.parse_args()
    is_digits = options.base == "digits"
    num_questions = 2 * options.requests * len(options.counts)
    questions = (
        digit_conversations(*DIGIT_FILES)
        if is_digits
        else [text_prompt(number).messages for number in range(num_questions)]
    )
    if num_questions > len(questions):
        parser.error(f"{num_questions} questions are needed, of {len(questions)}; lower --requests")
    with tempfile.TemporaryDirectory() as folder:
        source = DIGITS if is_digits else write_smolvlm(Path(folder, "smolvlm"))
        sources = write_adapters(
            Path(folder, "adapters"),
            BaseShape.of(source),
            num_adapters=max(options.counts),
            num_contents=NUM_CONTENTS,
            rank=8 if is_digits else 1,
        )
        with running_service(Path(folder), environment=SMALL_CACHES) as deployment:
            model = MODEL if is_digits else "smolvlm"
            if not is_digits:
                deployment.register(source, model)
            found = grow(
                deployment,
                sources,
                iter(questions),
                model=model,
                counts=options.counts,
                num_requests=options.requests,
            )
    slopes = {
        name: slope(options.counts, [level[name] for level in found])
        for name in (
            "mean_seconds",
            "p50_seconds",
            "worker_cpu_seconds_per_request",
            f"{INFERENCE}_resident_bytes",
            f"{API}_resident_bytes",
        )
    }
    print(slopes)
    name = "serving/memory" if is_digits else "serving/memory_smolvlm"
    print(write_result(name, {"levels": found, "slopes": slopes, **vars(options)}))


if __name__ == "__main__":
    main()
