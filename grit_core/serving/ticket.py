"""One request on its way through the engine: what is asked, what has been answered, who waits."""

import time
from queue import SimpleQueue

from grit_core.serving.adapter_weights import AdapterWeights
from grit_core.serving.answers import Generation, GenerationRequest
from grit_core.serving.resident_model import Prefilled, Prompt, ResidentModel
from grit_core.serving.sampling import TokenSampler
from grit_core.serving.text_stream import TextStream
from grit_core.serving.token_chooser import TokenChooser


class Ticket:
    """Filled by the engine's thread, read by the one that asked."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt: Prompt,
        resident: ResidentModel,
        *,
        adapter: AdapterWeights | None,
        load_seconds: float,
    ) -> None:
        """Begin to wait."""
        self.request, self.prompt, self.resident, self.adapter = request, prompt, resident, adapter
        self.outbox: SimpleQueue[str | Generation | Exception] = SimpleQueue()
        """Pieces of text, then the whole answer or what went wrong."""
        self.stopped = False
        """Nobody waits any more. Set by the one that asked."""
        self.slot: int | None = None
        self.offset = 0
        self.ids: list[int] = []
        """Tokens of the answer."""
        self.prompt_ids: list[int] = prompt.ids_T.tolist()
        self._stop_token_ids = resident.stops_with(adapter)
        self.constraint = resident.constrain(request.grammar, self._stop_token_ids)
        """What the answer is held to; none where it is free."""
        tokenizer = resident.encoder.renderer.tokenizer
        if self.constraint is not None:
            tokenizer = self.constraint.tokenizer  # the text is what the grammar has seen
        self._text = TextStream(
            tokenizer, request.stop, blank=resident.blank, hidden=prompt.hidden_token_ids
        )
        self.sampler = TokenSampler(
            temperature=request.temperature, top_p=request.top_p, seed=request.seed
        )
        self._load_seconds = load_seconds
        self._asked = time.perf_counter()
        self._first_token_seconds = 0.0
        self._cached_tokens, self._image_cached = 0, False
        self._finish_reason = ""

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the longest answer."""
        return len(self.prompt_ids) + self.request.max_new_tokens

    @property
    def has_ended(self) -> bool:
        """Whether its last token has come."""
        return bool(self._finish_reason)

    @property
    def scope(self) -> str | None:
        """What keys and values belong to, beside their tokens."""
        return None if self.adapter is None else self.adapter.id

    @property
    def seed(self) -> int:
        """The one asked for, or one of its own."""
        return self.sampler.seed

    def begin(self, prefilled: Prefilled) -> bool:
        """Take the first token; true when it was the last."""
        self.offset = prefilled.offset
        self._cached_tokens, self._image_cached = prefilled.cached_tokens, prefilled.image_cached
        chooser = TokenChooser(
            [self], device=prefilled.logits_V.device, penalty=self.resident.penalty
        )
        return self.take(chooser.choose(prefilled.logits_V[None])[0])

    def take(self, token: int) -> bool:
        """Add a token to the answer; true when the answer ends with it."""
        if not self.ids:
            self._first_token_seconds = time.perf_counter() - self._asked
        self.ids.append(token)
        ended = token in self._stop_token_ids
        whole = False
        if self.constraint is not None and not ended:
            whole = self.constraint.accept(token)
            if self.constraint.fault is not None:
                self._finish_reason = "error"
                return True
        piece = "" if ended else self._text.add(token)
        if piece:
            self.outbox.put(piece)
        if ended or whole or self._text.stopped:
            self._finish_reason = "stop"
        elif len(self.ids) == self.request.max_new_tokens:
            self._finish_reason = "length"
        return bool(self._finish_reason)

    def fail(self, error: Exception) -> None:
        """Tell the one that waits what went wrong."""
        self.outbox.put(error)

    def finish(self) -> None:
        """Hand over the whole answer, if its last token has come."""
        if not self._finish_reason:
            return
        if self.constraint is not None and self.constraint.fault is not None:
            self.outbox.put(self.constraint.fault)
            return
        if rest := self._text.finish():
            self.outbox.put(rest)
        self.outbox.put(
            Generation(
                text=self._text.text,
                finish_reason=self._finish_reason,
                prompt_tokens=len(self.prompt_ids),
                image_tokens=self.prompt.image_tokens,
                completion_tokens=len(self.ids),
                load_seconds=self._load_seconds,
                first_token_seconds=self._first_token_seconds,
                image_cached=self._image_cached,
                cached_prompt_tokens=self._cached_tokens,
            )
        )
