"""Answers from base models that stay loaded, with many adapters that come and go.

One request is answered at a time: a lock guards the models, so that any thread may ask. An adapter
is loaded by PEFT beside the others on its base model and switched on for one answer; the adapter
that was not asked for the longest makes room.
"""

import random
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from grit_core.artifacts import CONFIG, WEIGHTS
from grit_core.data import ChatEncoder, decode_image
from grit_core.errors import AdapterInvalid, Fault, InvalidConfig
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import ChatRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """What to answer and how."""

    chat: ChatRecord
    """Ends with the user's turn."""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    seed: int | None = None
    """With a temperature: the same seed gives the same answer."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One answer."""

    text: str
    finish_reason: str
    """`stop`: the model or a stop text ended it; `length`: `max_new_tokens` did."""
    prompt_tokens: int
    """Image tokens included."""
    image_tokens: int
    completion_tokens: int
    load_seconds: float
    """Spent on loading the base model or the adapter; near 0 when both were there."""
    first_token_seconds: float
    """From the start of generation to its first token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSource:
    """An adapter on disk."""

    id: str
    folder: Path
    """A PEFT folder with safetensors."""


@dataclass(kw_only=True)
class _Resident:
    """A base model in memory with the adapters beside it, the least recently used first."""

    model: nn.Module
    encoder: ChatEncoder
    max_positions: int | None
    adapted: PeftModel | None = None
    adapters: OrderedDict[str, None] = field(default_factory=OrderedDict)


class GenerationEngine:
    """Generates with base models and adapters kept in memory. Safe to share between threads."""

    def __init__(
        self,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_bases: int = 2,
        max_adapters: int = 16,
    ) -> None:
        """Load nothing yet.

        Args:
            device: Where the models live.
            dtype: `float32`, `bfloat16` or `float16`.
            max_bases: Base models kept in memory.
            max_adapters: Adapters kept beside each.
        """
        self._device = torch.device(device)
        self._dtype = dtype
        self._max_bases, self._max_adapters = max_bases, max_adapters
        self._bases: OrderedDict[str, _Resident] = OrderedDict()
        self._lock = threading.Lock()

    def generate(
        self, source: str, request: GenerationRequest, *, adapter: AdapterSource | None = None
    ) -> Generation:
        """Answer with a base model, or with an adapter on it.

        Args:
            source: A local folder or hub id.
            request: What to answer.
            adapter: `None` for the base model as it is.

        A model or adapter that cannot be loaded raises `ModelUnavailable` or `AdapterInvalid`, a
        chat that the model's template refuses `InvalidDataset`, and one that does not fit into the
        model's context `InvalidConfig`.
        """
        with self._lock, torch.inference_mode():
            started = time.perf_counter()
            resident = self._resident(source)
            if adapter is not None:
                self._load_adapter(source, resident, adapter)
            load_seconds = time.perf_counter() - started
            images = [decode_image(data, index=i) for i, data in enumerate(request.chat.images)]
            inputs = resident.encoder.encode_prompt(request.chat.messages, images)
            _refuse_overflow(inputs, request, resident.max_positions)
            with _switched(resident, None if adapter is None else adapter.id) as model:
                return self._generate(model, resident.encoder, inputs, request, load_seconds)

    def resident_adapters(self, source: str) -> tuple[str, ...]:
        """The adapters in memory beside a base model, the least recently used first."""
        resident = self._bases.get(source)
        return () if resident is None else tuple(resident.adapters)

    def _generate(
        self,
        model: Any,
        encoder: ChatEncoder,
        inputs: dict[str, Tensor],
        request: GenerationRequest,
        load_seconds: float,
    ) -> Generation:
        tokenizer = encoder.renderer.tokenizer
        prompt_tokens = inputs["input_ids"].shape[1]
        watch = _Watch(tokenizer, request.stop, prompt_tokens)
        options: dict[str, Any] = {
            "max_new_tokens": request.max_new_tokens,
            "do_sample": request.temperature > 0,
            "num_beams": 1,
            "pad_token_id": encoder.pad_token_id,
            "stopping_criteria": StoppingCriteriaList([watch]),
        }
        if request.temperature > 0:
            options |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        floating = next(model.parameters()).dtype
        placed = {
            name: t.to(self._device, floating if t.is_floating_point() else None)
            for name, t in inputs.items()
        }
        with self._seeded(request):
            output = model.generate(**placed, **options)
        ids = output[0, prompt_tokens:].tolist()
        return Generation(
            text=_cut(_words(tokenizer, ids), request.stop),
            finish_reason="stop" if watch.found or _ended(model, ids) else "length",
            prompt_tokens=prompt_tokens,
            image_tokens=int(torch.isin(inputs["input_ids"], encoder.image_token_ids).sum().item()),
            completion_tokens=len(ids),
            load_seconds=load_seconds,
            first_token_seconds=watch.first_token_seconds,
        )

    @contextmanager
    def _seeded(self, request: GenerationRequest) -> Iterator[None]:
        """Sample from a state of its own and leave the process's random state as it was."""
        if request.temperature <= 0:
            yield
            return
        devices = [self._device] if self._device.type == "cuda" else []
        seed = random.SystemRandom().getrandbits(63) if request.seed is None else request.seed
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def _resident(self, source: str) -> _Resident:
        found = self._bases.get(source)
        if found is None:
            while len(self._bases) >= self._max_bases:
                self._bases.popitem(last=False)
            model = load_base_model(source, device=self._device, dtype=self._dtype)
            config: Any = model.config
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            found = _Resident(
                model=model,
                encoder=ChatEncoder(load_processor(source)),
                max_positions=getattr(text, "max_position_embeddings", None),
            )
            self._bases[source] = found
        self._bases.move_to_end(source)
        return found

    def _load_adapter(self, source: str, resident: _Resident, adapter: AdapterSource) -> None:
        """Bring an adapter beside its base model."""
        if adapter.id in resident.adapters:
            resident.adapters.move_to_end(adapter.id)
            return
        try:
            resident.adapted = _load_beside(resident, adapter)
        except BaseException:
            # Half an adapter may be in the layers now, and a first one would be switched on: no
            # answer may come from this model. The next request loads it afresh.
            self._bases.pop(source, None)
            raise
        resident.adapted.eval()
        resident.adapters[adapter.id] = None
        while len(resident.adapters) > self._max_adapters:
            oldest, _ = resident.adapters.popitem(last=False)
            resident.adapted.delete_adapter(oldest)


def _load_beside(resident: _Resident, adapter: AdapterSource) -> PeftModel:
    """Load an adapter with PEFT and check that every tensor of it found its place.

    Raises:
        AdapterInvalid: The folder is no safetensors PEFT folder, or of another base model.
    """
    missing = [n for n in (CONFIG, WEIGHTS) if not (adapter.folder / n).is_file()]
    if missing:
        # Without the safetensors file PEFT would look for a pickle.
        raise AdapterInvalid(f"The adapter {adapter.id} lacks {', '.join(missing)}.")
    adapted = resident.adapted
    try:
        with safe_open(adapter.folder / WEIGHTS, framework="pt") as weights:
            stored = set(weights.keys())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            if adapted is None:
                adapted = PeftModel.from_pretrained(
                    resident.model, str(adapter.folder), adapter_name=adapter.id
                )
            else:
                adapted.load_adapter(str(adapter.folder), adapter_name=adapter.id)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterInvalid(
            f"The adapter {adapter.id} cannot be loaded on this base model: {error}"
        ) from error
    state = get_peft_model_state_dict(adapted, adapter_name=adapter.id, save_embedding_layers=False)
    # PEFT leaves what is missing as it was made, which does nothing, and skips what has no place.
    astray = sorted(stored ^ set(state))
    if astray:
        raise AdapterInvalid(
            f"The adapter {adapter.id} does not fit this base model: {len(astray)} tensors are "
            f"missing or have no layer, {astray[0]} among them."
        )
    return adapted


class _Watch(StoppingCriteria):  # type: ignore[misc]  # mypy follows no transformers
    """Notes when the first token came and ends the answer at a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._stop, self._prompt_tokens = tokenizer, tuple(stop), prompt_tokens
        self._started = time.perf_counter()
        self.first_token_seconds = 0.0
        self.found = False

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_options: Any) -> Tensor:
        if not self.first_token_seconds:
            self.first_token_seconds = time.perf_counter() - self._started
        if self._stop:
            text = _words(self._tokenizer, input_ids[0, self._prompt_tokens :].tolist())
            self.found = any(stop in text for stop in self._stop)
        return torch.full((len(input_ids),), self.found, device=input_ids.device)


@contextmanager
def _switched(resident: _Resident, adapter_id: str | None) -> Iterator[Any]:
    """The resident model with one adapter on, or with none."""
    if resident.adapted is None:
        yield resident.model
    elif adapter_id is None:
        with resident.adapted.disable_adapter():
            yield resident.adapted
    else:
        resident.adapted.set_adapter(adapter_id, inference_mode=True)
        yield resident.adapted


def _refuse_overflow(
    inputs: dict[str, Tensor], request: GenerationRequest, max_positions: int | None
) -> None:
    """Refuse what does not fit into the context.

    Raises:
        InvalidConfig: Prompt and answer together are longer than the model's context.
    """
    prompt_tokens = inputs["input_ids"].shape[1]
    if max_positions is None or prompt_tokens + request.max_new_tokens <= max_positions:
        return
    detail = (
        f"The prompt has {prompt_tokens} tokens and max_new_tokens is {request.max_new_tokens}; "
        f"together they may be {max_positions}. Shorten one of them."
    )
    raise InvalidConfig([Fault(pointer="/max_new_tokens", code="request_too_large", detail=detail)])


def _words(tokenizer: Any, ids: Sequence[int]) -> str:
    """The words of an answer, without the space that templates leave before it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).lstrip()


def _cut(text: str, stop: Sequence[str]) -> str:
    """Cut at the first stop text."""
    ends = [text.index(one) for one in stop if one in text]
    return text[: min(ends, default=len(text))].strip()


def _ended(model: Any, ids: Sequence[int]) -> bool:
    """Tell whether the model itself ended the answer."""
    eos = model.generation_config.eos_token_id
    ends = set(eos) if isinstance(eos, list) else {eos}
    return bool(ids) and ids[-1] in ends
