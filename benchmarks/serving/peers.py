"""The peers: transformers and PEFT, each used as its documentation says for many adapters.

Merged: one adapter in the weights, a plain batch. Mixed: PEFT's `adapter_names`, a row for each
adapter. In turn: `set_adapter` and one `generate` after another. All greedy, in float32.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.serving.prompts import Prompt
from grit_core.data.encoder import ChatEncoder
from grit_core.generation import AdapterSource
from grit_core.models.pretrained import (
    known_warnings_ignored,
    load_base_model,
    load_processor,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured batch."""

    seconds: float
    """From the first prompt to the last token."""
    decode_seconds: float
    """Without prefill: from each batch's first token to its last."""
    decode_cpu_seconds: float
    """Of all threads, for the same tokens: what other programs of the machine change less."""
    num_decoded: int
    """Tokens after the first of each row."""
    tokens: list[list[int]] = field(repr=False)
    """By row."""

    @property
    def rate(self) -> float:
        """Tokens a second while decoding."""
        return self.num_decoded / self.decode_seconds

    @property
    def cpu_rate(self) -> float:
        """Tokens a second of processor time."""
        return self.num_decoded / self.decode_cpu_seconds


class _FirstToken(StoppingCriteria):
    """Notes when the first token was there; ends nothing."""

    def __init__(self) -> None:
        self.at = self.cpu_at = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        if not self.at:
            self.at, self.cpu_at = time.perf_counter(), time.process_time()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Peer:
    """A base model under transformers, with any number of PEFT adapters."""

    def __init__(self, source: Path, adapters: Sequence[AdapterSource] = ()) -> None:
        self.encoder = ChatEncoder(load_processor(str(source)))
        self.model: Any = load_base_model(
            str(source), device=torch.device("cpu"), dtype="float32"
        ).eval()
        self._adapted = False
        for adapter in adapters:
            self.load_adapter(adapter)

    def load_adapter(self, adapter: AdapterSource, *, quickly: bool = True) -> None:
        """`load_adapter`, for inference.

        Args:
            adapter: Not loaded yet.
            quickly: With `low_cpu_mem_usage`, which spares PEFT the random start of every matrix.
        """
        options = {"adapter_name": adapter.id, "low_cpu_mem_usage": quickly}
        with known_warnings_ignored():
            if self._adapted:
                self.model.load_adapter(str(adapter.folder), **options)
                return
            adapted = PeftModel.from_pretrained(self.model, str(adapter.folder), **options)
            self.model, self._adapted = adapted.eval(), True

    def delete_adapter(self, adapter: AdapterSource) -> None:
        """`delete_adapter`."""
        self.model.delete_adapter(adapter.id)

    def set_adapter(self, adapter: AdapterSource) -> None:
        """`set_adapter`, for inference."""
        self.model.set_adapter(adapter.id, inference_mode=True)

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """One batch of prompts of equal length, so that nothing is padded.

        Raises:
            ValueError: Their lengths differ.
        """
        encoded = [self.encoder.encode_prompt(p.chat.messages, p.images()) for p in prompts]
        lengths = {one["input_ids"].shape[1] for one in encoded}
        if len(lengths) > 1:
            raise ValueError(f"the prompts have {sorted(lengths)} tokens; make them equally long")
        return {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}

    def batch(
        self, prompts: Sequence[Prompt], *, num_tokens: int, names: Sequence[str] | None = None
    ) -> Run:
        """Generate for all prompts at once; `names`: PEFT's `adapter_names`, one for each row."""
        started = time.perf_counter()
        options = {} if names is None else {"adapter_names": list(names)}
        rows, first = self._generate(self.inputs(prompts), num_tokens, options)
        ended, cpu_ended = time.perf_counter(), time.process_time()
        return Run(
            seconds=ended - started,
            decode_seconds=ended - first.at,
            decode_cpu_seconds=cpu_ended - first.cpu_at,
            num_decoded=sum(len(row) - 1 for row in rows),
            tokens=rows,
        )

    def in_turn(
        self, prompts: Sequence[Prompt], adapters: Sequence[AdapterSource], *, num_tokens: int
    ) -> Run:
        """Switch to each adapter and generate for its prompt alone."""
        began, runs = time.perf_counter(), []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            self.set_adapter(adapter)
            runs.append(self.batch([prompt], num_tokens=num_tokens))
        return Run(
            seconds=time.perf_counter() - began,
            decode_seconds=sum(run.decode_seconds for run in runs),
            decode_cpu_seconds=sum(run.decode_cpu_seconds for run in runs),
            num_decoded=sum(run.num_decoded for run in runs),
            tokens=[run.tokens[0] for run in runs],
        )

    def answer(self, prompt: Prompt, *, num_tokens: int) -> tuple[str, float]:
        """A greedy answer, and the smallest lead of a chosen token's logit over the next best."""
        inputs = self.inputs([prompt])
        with torch.inference_mode():
            found = self.model.generate(
                **inputs,
                max_new_tokens=num_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.encoder.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        best = torch.stack([step[0].topk(2).values for step in found.logits])
        text = self.encoder.renderer.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip(), float((best[:, 0] - best[:, 1]).min())

    def logits(self, inputs: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
        """The logits of every position."""
        options = {} if names is None else {"adapter_names": list(names)}
        with torch.inference_mode():
            return self.model(**inputs, use_cache=False, **options).logits

    def _generate(
        self, inputs: Mapping[str, Tensor], num_tokens: int, options: Mapping[str, Any]
    ) -> tuple[list[list[int]], _FirstToken]:
        watch = _FirstToken()
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self.model.generate(
                **inputs,
                **options,
                max_new_tokens=num_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.encoder.pad_token_id,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        return output[:, inputs["input_ids"].shape[1] :].tolist(), watch
