"""A base model in memory: prompts go through it one by one, next tokens for many rows at once.

Whether its rows can share steps is found out when it is loaded, by trying: two short prompts of
different lengths are continued side by side and must give the logits that each gives alone. Models
that attend in windows, carry a state of another kind or choose tokens by rules of their own answer
one request at a time, by transformers' `generate`.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

import logging
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, RepetitionPenaltyLogitsProcessor

from grit_core.data.encoder import ChatEncoder
from grit_core.device_memory import count_total_bytes
from grit_core.errors import InvalidDataset
from grit_core.library_errors import is_device_failure, ran_out_of_memory, reason
from grit_core.loss import keeps_chosen_logits
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.models.shared_length import shared_length
from grit_core.serving.adapter_weights import AdapterWeights
from grit_core.serving.constraint import Constraint
from grit_core.serving.grammar_tokenizer import GrammarTokenizer, copy_backend
from grit_core.serving.image_features import ImageFeatures
from grit_core.serving.prefixes import CAUSAL_TYPES, Prefixes
from grit_core.serving.row_cache import RowCache, count_token_bytes, is_plain
from grit_core.serving.slots import AdapterSlots
from grit_core.tools.call_format import CallFormat
from grit_core.transfer import to_device

TOLERANCES: Final = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""Largest difference between shared and lone steps at loading, relative to the largest logit."""

PROBES: Final = ("A short text.", "Another text, which is longer than the first one.")

OWN_RULES: Final = (
    *("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("sequence_bias", "min_length", "min_new_tokens", "guidance_scale"),
)
"""Settings of a model's generation that are transformers' own business."""

ONE_BASED_TYPES: Final = frozenset({"paligemma"})
"""Model types that count positions from 1."""

MISFITS: Final = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)
"""What a model raises whose `forward` is not made for rows of different lengths."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A chat as the model reads it, as a batch of one."""

    inputs: dict[str, Tensor]
    """The model's arguments, on the CPU."""
    images: tuple[str, ...]
    """SHA-256 of each image's bytes."""
    image_tokens: int
    calls: CallFormat | None = None
    """How the answer writes calls of tools, where the chat has tools."""
    hidden_token_ids: frozenset[int] | None = None
    """Tokens that are left out of the answer's text; `None` for all special ones."""

    @property
    def ids_T(self) -> Tensor:
        """Its tokens."""
        return self.inputs["input_ids"][0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefilled:
    """What a prompt left behind."""

    logits_V: Tensor
    """Of the first token of the answer."""
    cache: Any
    offset: int
    """Positions of later tokens, less the tokens before them."""
    cached_tokens: int
    """Tokens whose keys and values were there already."""
    image_cached: bool


class ResidentModel:
    """One base model and what its requests share. The engine's thread alone runs it."""

    def __init__(
        self,
        model: nn.Module,
        encoder: ChatEncoder,
        *,
        num_slots: int,
        max_adapter_bytes: int,
        image_cache_bytes: int,
        prefix_cache_bytes: int,
    ) -> None:
        """Take over a model.

        Args:
            model: In evaluation mode, where it is to stay.
            encoder: Of its processor.
            num_slots: Adapters in place at once.
            max_adapter_bytes: Bound on their tables.
            image_cache_bytes: Bound on the image features kept.
            prefix_cache_bytes: Bound on the keys and values kept.
        """
        self.model: Any = model
        self.encoder = encoder
        weights = next(model.parameters())
        self.device, self.dtype = weights.device, weights.dtype
        config: Any = self.model.config
        text: Any = config.get_text_config()
        self.max_positions: int | None = getattr(text, "max_position_embeddings", None)
        self.stop_token_ids = _eos_token_ids(self.model) | _end_of_turn_ids(encoder)
        """What every answer stops at: EOS, and what ends a turn in the chat template."""
        self.blank = encoder.blank_before_answers
        """What an answer begins with that is the chat template's and no part of the text."""
        self.slots = AdapterSlots(self.model, num_slots=num_slots, max_bytes=max_adapter_bytes)
        self.images = ImageFeatures(self.model, max_bytes=image_cache_bytes)
        self._first_position = int(config.model_type in ONE_BASED_TYPES)
        causal = config.model_type in CAUSAL_TYPES
        self.prefixes = Prefixes(max_bytes=prefix_cache_bytes if causal else 0)
        self.linear_layers = tuple(
            name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)
        )
        """Their names: what an adapter may adapt."""
        decoder = _decoder(self.model)
        self._text_prefix = next(
            (f"{name}." for name, module in self.model.named_modules() if module is decoder), None
        )
        """What the names of the text model's layers begin with; none where they cannot be told."""
        self._keeps_logits = keeps_chosen_logits(self.model)
        self._additive_mask = getattr(text, "_attn_implementation", "") == "eager"
        penalty = getattr(self.model.generation_config, "repetition_penalty", None) or 1.0
        self.penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None
        """The model's own, on tokens that have been there."""
        self.key_bytes_per_token = 0
        """Keys and values of one token; 0 where it was not found out."""
        self.alone_because = self._refuse_sharing()
        """Why its rows cannot share steps; empty where they can."""
        self.max_device_tokens = self._count_device_tokens()
        """Tokens of which the device can hold the keys and values beside the weights, if it holds
        nothing else; none where that is not known."""
        self._shared_length = shared_length(text)
        self._grammars: GrammarTokenizer | None = None
        self._reading_vocabulary = threading.Lock()
        self.encoding = threading.Lock()
        """Held while its processor is used."""
        self.in_flight = 0
        """Requests that need it; it stays in memory meanwhile."""

    @classmethod
    def load(cls, source: str, *, device: torch.device, dtype: str, **bounds: int) -> Self:
        """Load a base model with its processor.

        Args:
            source: A local folder or hub id; one that cannot be loaded raises `ModelUnavailable`.
            device: Where it lives.
            dtype: Of the weights, as `load_base_model` takes it.
            **bounds: As above.
        """
        model = load_base_model(source, device=device, dtype=dtype)
        resident = cls(model, ChatEncoder(load_processor(source)), **bounds)
        if not resident.shares_steps:
            why = resident.alone_because
            _log.warning("%s answers one request at a time: %s", source, why)
        return resident

    @property
    def shares_steps(self) -> bool:
        """Whether its rows can share steps."""
        return not self.alone_because

    @property
    def cache_bytes(self) -> int:
        """Memory that `drop_caches` gives back."""
        return self.images.num_bytes + self.prefixes.num_bytes + self.slots.num_gathered_bytes

    def drop_caches(self) -> None:
        """Let go of what is kept to be faster: image features, prefixes, gathered tables."""
        self.images.clear()
        self.prefixes.clear()
        self.slots.forget_route()

    def unload(self) -> None:
        """Let go of the weights, the adapters and all that is cached; it answers no more.

        What still holds this object, such as the traceback of a request that failed, holds no
        memory of the device with it.
        """
        self.drop_caches()
        self.slots.unload()
        self.model = None

    def stops_with(self, adapter: AdapterWeights | None) -> frozenset[int]:
        """Return the tokens that end an answer with an adapter."""
        return self.stop_token_ids | (frozenset() if adapter is None else adapter.stop_token_ids)

    def shares(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens, its answer included, can share steps."""
        limit = self._shared_length
        return self.shares_steps and (limit is None or num_tokens <= limit)

    def constrain(self, grammar: str, stop_token_ids: Iterable[int]) -> Constraint | None:
        """Begin to hold an answer to a grammar. The vocabulary is read for the first one.

        Args:
            grammar: As `grit_core.grammars` writes it; empty for a free answer.
            stop_token_ids: What ends the answer.

        A tokenizer that cannot be held to a grammar, or a grammar that is wrong or too large,
        raises `InvalidConfig`.
        """
        if not grammar:
            return None
        with self._reading_vocabulary:
            if self._grammars is None:
                tokenizer = self.encoder.renderer.tokenizer
                end = min(self.stop_token_ids, default=tokenizer.eos_token_id or 0)
                with self.encoding:
                    backend = copy_backend(tokenizer)
                self._grammars = GrammarTokenizer(backend, eos_token_id=end)
        return Constraint(self._grammars.compile(grammar), self._grammars, stop_token_ids)

    def features_of(self, prompt: Prompt, adapter: AdapterWeights | None) -> Hashable | None:
        """What the features of a prompt's images depend on; none where there are none."""
        if not prompt.images:
            return None
        if adapter is None or self._only_text(adapter):
            return prompt.images
        return (adapter.id, *prompt.images)

    @torch.inference_mode()
    def prefill(
        self, prompt: Prompt, *, slot: int | None, adapter: AdapterWeights | None = None
    ) -> Prefilled:
        """Run a prompt through the model with the adapter of a slot."""
        self.slots.route_all(slot)
        ids_T = prompt.ids_T
        cache, cached = self.prefixes.find(
            ids_T,
            scope=None if adapter is None else adapter.id,
            images=prompt.images,
            image_token_ids=self.encoder.image_token_ids,
        )
        hits = self.images.hits
        with self.images.of(self.features_of(prompt, adapter)):
            if cached:
                output = self._go_on(ids_T, cache, cached)
            else:
                output = self.model(**self.placed(prompt), **self._options())
        # Models with positions in several dimensions say how far text and tokens are apart.
        deltas = getattr(getattr(self.model, "model", None), "rope_deltas", None)
        return Prefilled(
            logits_V=output.logits[0, -1].float(),
            cache=output.past_key_values,
            offset=self._first_position
            + (0 if deltas is None or not prompt.images else int(deltas.reshape(-1)[0])),
            cached_tokens=cached,
            # A prefix that was there reaches beyond the last image.
            image_cached=self.images.hits > hits or bool(cached and prompt.images),
        )

    @torch.inference_mode()
    def step(
        self,
        tokens: Sequence[int],
        rows: RowCache,
        *,
        slots: Sequence[int | None],
        offsets: Sequence[int],
    ) -> Tensor:
        """Run one token of every row through the model.

        Args:
            tokens: The last token of each row.
            rows: Keys and values of what came before; this step's are added.
            slots: The adapter of each row.
            offsets: As in `Prefilled`, of each row.

        Returns:
            The logits of the rows' next tokens, float32 [B, V].
        """
        self.slots.route_rows(slots)
        step_3B = to_device(torch.tensor([tokens, rows.lengths, offsets]), self.device)
        tokens_B, ends_B, offsets_B = step_3B
        mask_B11T = rows.begin_step(ends_B)
        output = self.model(
            input_ids=tokens_B[:, None],
            attention_mask=self._mask(mask_B11T),
            position_ids=(ends_B + offsets_B)[:, None],
            past_key_values=rows.cache,
            use_cache=True,
        )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    def placed(self, prompt: Prompt) -> dict[str, Tensor]:
        """The model's arguments on its device, in its precision."""
        return {
            name: to_device(t.to(self.dtype) if t.is_floating_point() else t, self.device)
            for name, t in prompt.inputs.items()
        }

    def _only_text(self, adapter: AdapterWeights) -> bool:
        prefix = self._text_prefix
        return prefix is not None and all(name.startswith(prefix) for name in adapter.layers)

    def _go_on(self, ids_T: Tensor, cache: Any, cached: int) -> Any:
        return self.model(
            input_ids=to_device(ids_T[None, cached:], self.device),
            attention_mask=torch.ones(1, len(ids_T), dtype=torch.long, device=self.device),
            position_ids=torch.arange(cached, len(ids_T), device=self.device)[None],
            past_key_values=cache,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        return {"use_cache": True} | ({"logits_to_keep": 1} if self._keeps_logits else {})

    def _mask(self, mask_B11T: Tensor) -> Tensor:
        if not self._additive_mask:
            return mask_B11T
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(mask_B11T, dtype=self.dtype).masked_fill(~mask_B11T, lowest)

    def _count_device_tokens(self) -> int | None:
        total = count_total_bytes(self.device)
        if total is None or not self.key_bytes_per_token:
            return None
        weights = sum(int(parameter.nbytes) for parameter in self.model.parameters())
        return int(max(0, total - weights) // self.key_bytes_per_token)

    @torch.inference_mode()
    def _refuse_sharing(self) -> str:
        """Continue two prompts together and compare with each alone.

        Returns:
            Why rows cannot share steps; empty where they can. A device that fails or has no memory
            left says nothing about the model: that error passes.
        """
        rules = [rule for rule in OWN_RULES if getattr(self.model.generation_config, rule, None)]
        if rules:
            return f"its generation_config.json sets {', '.join(rules)}"
        try:
            difference, bound = self._compare_shared_steps()
        except _NotPlain as error:
            return str(error)
        except Exception as error:
            of_device = ran_out_of_memory(error) or is_device_failure(error)
            if of_device or not isinstance(error, MISFITS):
                raise
            return f"a shared step fails with {reason(error)}"
        if difference <= bound:
            return ""
        return (
            f"the logits of a shared step differ by {difference:.3g} from those of each prompt"
            f" alone, and at most {bound:.3g} is rounding"
        )

    def _compare_shared_steps(self) -> tuple[float, float]:
        """Return the largest difference between the logits of both ways, and what is allowed.

        Raises:
            _NotPlain: The keys and values of rows cannot be put side by side.
        """
        tokenizer = self.encoder.renderer.tokenizer
        prompts = [
            tokenizer(text, return_tensors="pt")["input_ids"].to(self.device) for text in PROBES
        ]
        rows, tokens, alone = RowCache(max_rows=len(prompts)), [], []
        for ids_1T in prompts:
            output = self.model(input_ids=ids_1T[:, :-1], use_cache=True)
            cache = output.past_key_values
            if not is_plain(cache):
                raise _NotPlain(f"its cache is not one of full attention only ({_kinds(cache)})")
            rows.join(cache)
            self.key_bytes_per_token = count_token_bytes(cache)
            tokens.append(int(ids_1T[0, -1]))
            alone.append(self.model(input_ids=ids_1T, use_cache=False).logits[0, -1].float())
        shared_BV = self.step(
            tokens,
            rows,
            slots=[None] * len(tokens),
            offsets=[self._first_position] * len(tokens),
        )
        alone_BV = torch.stack(alone)
        difference = float((shared_BV - alone_BV).abs().max())
        return difference, TOLERANCES[self.dtype] * max(1.0, float(alone_BV.abs().max()))


class _NotPlain(Exception):
    """Rows cannot be put side by side."""


def _kinds(cache: Any) -> str:
    layers = getattr(cache, "layers", None) or [cache]
    return ", ".join(sorted({type(layer).__name__ for layer in layers}))


def _eos_token_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


def _end_of_turn_ids(encoder: ChatEncoder) -> frozenset[int]:
    try:
        return encoder.end_of_turn.stop_token_ids
    except InvalidDataset as error:
        _log.warning("the chat template names no end of turn: %s", error)
        return frozenset()


def _decoder(model: Any) -> Any:
    """The text model, where transformers tells which it is."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    return decoder if isinstance(decoder, PreTrainedModel) else None
