"""What one answer is held to: which tokens may come next, as a grammar has it.

The mask of the next token depends only on the tokens so far. So it is prepared in another thread
while the model runs its step, and is there when the logits are.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from grit_core.errors import Fault, InvalidConfig
from grit_core.grammars import NO_VALUE, plain_reason
from grit_core.serving.grammar_tokenizer import GrammarTokenizer

_log = logging.getLogger(__name__)

SECONDS_AHEAD: Final = 2.0
"""Processor time that the masks of one answer may take beyond `SECONDS_PER_TOKEN` each.

The rows of a batch wait for each other's masks: no schema may hold the others up for long."""
SECONDS_PER_TOKEN: Final = 0.02

_DEAD_END: Final = "no token of the model's vocabulary goes on from here"
_MINUS_INFINITY: Final = np.float32(-np.inf).view(np.uint32)
"""Its bits."""


class Constraint:
    """Follows one answer. Used by one thread at a time."""

    def __init__(
        self, matcher: LLMatcher, tokenizer: GrammarTokenizer, stop_token_ids: Iterable[int]
    ) -> None:
        """Begin an answer, and prepare the mask of its first token.

        Args:
            matcher: At the beginning of the grammar.
            tokenizer: That it was compiled for.
            stop_token_ids: What ends an answer; they may come where the grammar may end.
        """
        self._matcher, self.tokenizer = matcher, tokenizer
        self._stops = [token for token in stop_token_ids if token < tokenizer.num_tokens]
        self._bits = np.zeros((tokenizer.num_tokens + 31) // 32, dtype=np.int32)
        self._bias_N = torch.empty(0)
        self._seconds_left = SECONDS_AHEAD
        self.fault: InvalidConfig | None = None
        """Why the answer cannot go on."""
        self.prepare()

    def prepare(self) -> None:
        """Find out which tokens may come next. Other threads run meanwhile."""
        if self.fault is not None:
            return
        started = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._seconds_left += SECONDS_PER_TOKEN - (time.thread_time() - started)
        if self._matcher.is_error():
            self._give_up()
            return
        if self._seconds_left < 0:
            self.fail("what may come next takes too long to find", code="grammar_too_complex")
            return
        may_N = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        may_N = may_N[: self.tokenizer.num_tokens]
        may_N[self.tokenizer.never_N] = 0
        may_N[self._stops] = self._matcher.is_accepting()
        if not may_N.any():
            self.fail(_DEAD_END)
            return
        # 0 for what may come and -inf for the rest, in whole passes: a table look-up is slower.
        bias_N = may_N.astype(np.uint32) - np.uint32(1)
        bias_N &= _MINUS_INFINITY
        self._bias_N = torch.from_numpy(bias_N.view(np.float32))

    def apply(self, logits_V: Tensor) -> None:
        """Take the tokens out, in place, that may not come next.

        Args:
            logits_V: Of the next token. A model may have more than its tokenizer has tokens.
        """
        if self.fault is not None:
            return
        num = min(len(logits_V), len(self._bias_N))
        logits_V[:num] += self._bias_N[:num].to(logits_V.device, logits_V.dtype)
        logits_V[num:] = -torch.inf

    def accept(self, token: int) -> bool:
        """Go on by a token; true when nothing may follow it."""
        if self.fault is None and not self._matcher.consume_token(token):
            self._give_up()
        return self.fault is not None or self._matcher.is_stopped()

    def _give_up(self) -> None:
        """Note what the engine says, once it goes on no more."""
        reason = plain_reason(self._matcher.get_error())
        if reason == NO_VALUE:
            self.fail(_DEAD_END)
        else:
            self.fail(reason, code="grammar_too_complex")

    def fail(self, reason: str, *, code: str = "grammar_unsupported") -> None:
        """Note why the answer cannot go on.

        Args:
            reason: In words.
            code: Of the fault.
        """
        detail = f"The answer cannot be held to the schema: {reason}. Simplify the schema."
        self.fault = InvalidConfig([Fault(pointer="/schema", code=code, detail=detail)])


class MaskThread:
    """Prepares masks beside the model's steps."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks")

    def prepare(self, constraints: Sequence[Constraint]) -> "Future[Any] | None":
        """Begin to prepare the next masks of some answers; await the result before their use."""
        return self._pool.submit(_prepare_all, constraints) if constraints else None

    def close(self) -> None:
        """End the thread, if there is one."""
        self._pool.shutdown()


def _prepare_all(constraints: Sequence[Constraint]) -> None:
    for constraint in constraints:
        try:
            constraint.prepare()
        except Exception as error:  # noqa: BLE001 - the other answers have nothing to do with it
            _log.exception("a mask could not be prepared")
            constraint.fail(f"the grammar engine failed ({type(error).__name__})")
