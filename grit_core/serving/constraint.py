"""What one answer is held to: which tokens may come next, as a grammar has it.

The mask of the next token depends only on the tokens so far. So it is prepared in another thread
while the model runs its step, and is there when the logits are. It stays a mask of bits on its way
to the model's device.

Shape suffixes: N tokens of the tokenizer, W words of a mask, H rows held to a grammar,
V vocabulary of the model.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray
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
        self._never_W = np.zeros((tokenizer.num_tokens + 31) // 32, dtype=np.uint32)
        never = np.packbits(tokenizer.never_N, bitorder="little")
        self._never_W.view(np.uint8)[: len(never)] = never
        self._may_W = np.zeros_like(self._never_W)
        self._seconds_left = SECONDS_AHEAD
        self.fault: InvalidConfig | None = None
        """Why the answer cannot go on."""
        self.prepare()

    def prepare(self) -> None:
        """Find out which tokens may come next. Other threads run meanwhile."""
        if self.fault is not None:
            return
        started = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._may_W.ctypes.data, self._may_W.nbytes)
        self._seconds_left += SECONDS_PER_TOKEN - (time.thread_time() - started)
        if self._matcher.is_error():
            self._give_up()
            return
        if self._seconds_left < 0:
            self.fail("what may come next takes too long to find", code="grammar_too_complex")
            return
        self._may_W &= ~self._never_W
        may_end = self._matcher.is_accepting()
        for token in self._stops:
            self._set(token, allowed=may_end)
        if not self._may_W.any():
            self.fail(_DEAD_END)

    def allows(self, token: int) -> bool:
        """Whether a token may come next. After a fault any may, as none counts."""
        if self.fault is not None:
            return True
        word, bit = divmod(token, 32)
        return word < len(self._may_W) and bool((int(self._may_W[word]) >> bit) & 1)

    def write_mask(self, mask_W: NDArray[np.uint32]) -> None:
        """Write which tokens may come next, the lowest bit of a word first.

        Args:
            mask_W: Zeros, for the model's vocabulary; that may have more tokens or fewer than the
                tokenizer.
        """
        num = min(len(mask_W), len(self._may_W))
        mask_W[:num] = self._may_W[:num]
        if self.fault is not None:
            mask_W[:] = ~np.uint32(0)

    def _set(self, token: int, *, allowed: bool) -> None:
        word, bit = divmod(token, 32)
        if allowed:
            self._may_W[word] |= np.uint32(1 << bit)
        else:
            self._may_W[word] &= ~np.uint32(1 << bit)

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


def pack_masks(constraints: Sequence[Constraint], *, num_logits: int) -> NDArray[np.uint32]:
    """Return the masks of some answers [H, W], in an even number of words.

    Args:
        constraints: With their masks prepared.
        num_logits: The vocabulary of the model.
    """
    masks_HW = np.zeros((len(constraints), 2 * -(-num_logits // 64)), dtype=np.uint32)
    for mask_W, constraint in zip(masks_HW, constraints, strict=True):
        constraint.write_mask(mask_W)
    return masks_HW


def build_mask_table(device: torch.device) -> Tensor:
    """Return what each byte of a mask adds to eight logits, float32 [256, 8]: 0 or -inf.

    Args:
        device: Where the logits are. Nothing is copied there.
    """
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return torch.zeros(bits.shape, device=device).masked_fill_(bits == 0, -torch.inf)


def expand_masks(masks_HW: Tensor, table: Tensor, *, num_logits: int) -> Tensor:
    """Return what is to be added to logits, float32 [H, V]: 0, or -inf for a refused token.

    Adding is quicker than filling by a mask on CPUs, and leaves an allowed logit as it is.

    Args:
        masks_HW: The bytes of what `pack_masks` returned, uint8.
        table: As `build_mask_table` returned it, on the same device.
        num_logits: The vocabulary of the model.
    """
    return table.index_select(0, masks_HW.flatten().int()).view(len(masks_HW), -1)[:, :num_logits]


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
