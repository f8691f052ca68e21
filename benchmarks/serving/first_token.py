"""The first token for an image that was seen before, with another adapter (I9).

    python -m benchmarks.serving.first_token # benchmarks/results/serving/first_token.json

SmolVLM-256M's shape, one 512-pixel image (64 image tokens) and a short question, adapters of the
text model that all have their slots. Cold: an image that nobody sent before. Warm: the image of
the round before, under an adapter that has not seen it, so that its features are reused and no key
or value can be. Again: the same image, question and adapter once more, where keys and values are
reused as well. Seconds are those of the whole call for one token, image decoding and all.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Final

import torch

from benchmarks.measure import write_result
from benchmarks.serving.adapters import BaseShape, write_adapters
from benchmarks.serving.bases import write_smolvlm
from benchmarks.serving.prompts import image_prompt
from benchmarks.serving.turns import ratio, take_turns, to_json
from benchmarks.smolvlm_shape import IMAGE_SIDE_PIXELS
from grit_core.generation import AdapterSource, Generation, GenerationEngine, GenerationRequest

NUM_ADAPTERS: Final = 4
RANK: Final = 16


class Asking:
    """One token for one image, under one adapter or another."""

    def __init__(self, source: Path, adapters: list[AdapterSource]) -> None:
        self._engine = GenerationEngine(max_adapters=len(adapters))
        self._source, self._adapters = str(source), adapters
        self._image = 0
        for adapter in adapters:
            self._ask(0, adapter)

    def cold(self, number: int) -> float:
        """An image of its own."""
        self._image = number + 2
        seconds, found = self._ask(self._image, self._adapters[0])
        self._check(cached=found.image_cached, expected=False)
        return seconds

    def warm(self, number: int) -> float:
        """An image that another adapter has answered about."""
        # In every other round this comes before the cold one, whose image has just come then.
        other = self._adapters[1 + number % (len(self._adapters) - 1)]
        seconds, found = self._ask(self._image, other)
        self._check(cached=found.image_cached, expected=True)
        if found.cached_prompt_tokens > found.prompt_tokens // 4:
            raise RuntimeError(f"{found.cached_prompt_tokens} tokens came from another's keys")
        return seconds

    def again(self, number: int) -> float:
        """The very same request once more."""
        # Keys are kept of rows that joined a batch, for which one token is too few.
        self._ask(self._image, self._adapters[0], num_tokens=2)
        seconds, found = self._ask(self._image, self._adapters[0])
        if not found.cached_prompt_tokens:
            raise RuntimeError("no key of the same request was reused")
        return seconds

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _ask(
        self, image: int, adapter: AdapterSource, *, num_tokens: int = 1
    ) -> tuple[float, Generation]:
        prompt = image_prompt(image, side_pixels=IMAGE_SIDE_PIXELS)
        request = GenerationRequest(chat=prompt.chat, max_new_tokens=num_tokens)
        started = time.perf_counter()
        found = self._engine.generate(self._source, request, adapter=adapter)
        return time.perf_counter() - started, found

    @staticmethod
    def _check(*, cached: bool, expected: bool) -> None:
        if cached != expected:
            raise RuntimeError(f"the image's features were{'' if cached else ' not'} there")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = write_smolvlm(Path(folder) / "smolvlm")
        adapters = write_adapters(
            Path(folder) / "adapters", BaseShape.of(source), num_adapters=NUM_ADAPTERS, rank=RANK
        )
        asking = Asking(source, adapters)
        arms = {"cold": asking.cold, "warm": asking.warm, "again": asking.again}
        for arm in arms.values():
            arm(-1)
        turns = take_turns(arms, num_rounds=options.rounds, say=print)
        asking.close()
    ratios = {name: ratio(turns[name], turns["cold"]) for name in ("warm", "again")}
    for name, one in ratios.items():
        print(f"{name} / cold: {one['median_ratio']:.3f} ({one['low']:.3f}, {one['high']:.3f})")
    result = {"options": vars(options), "ratios": ratios, "turns": to_json(turns)}
    print(write_result("serving/first_token", result))


if __name__ == "__main__":
    main()
