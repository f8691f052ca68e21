"""The next tokens of the rows of a step: chosen on the device, with one copy to the host.

What a row asks for is prepared when the rows change: which rows are sampled and at which
temperatures, and the tokens that a repetition penalty looks at. In a step, the tokens that the
rows' grammars refuse are taken out, the likeliest token of every row and the likeliest
`FIRST_CANDIDATES` of the sampled ones are found, and all of that is copied in one tensor. The draw
itself is the host's (`TokenSampler`).

Shape suffixes: B rows, S sampled rows, H rows held to a grammar, T tokens before, V vocabulary,
C candidates.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grit_core.serving.constraint import (
    Constraint,
    build_mask_table,
    expand_masks,
    pack_masks,
)
from grit_core.serving.sampling import FIRST_CANDIDATES, Candidates, TokenSampler
from grit_core.transfer import to_device

Penalty = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, V] from the tokens before [B, T] and logits [B, V]."""


class Row(Protocol):
    """What the next token of a row depends on, beside the logits."""

    @property
    def sampler(self) -> TokenSampler:
        """How it is drawn."""

    @property
    def constraint(self) -> Constraint | None:
        """What it is held to."""

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt."""

    @property
    def ids(self) -> list[int]:
        """The tokens of the answer so far."""


class TokenChooser:
    """Chooses for the same rows, step after step."""

    def __init__(
        self, rows: Sequence[Row], *, device: torch.device, penalty: Penalty | None = None
    ) -> None:
        """Prepare what stays the same from step to step.

        Args:
            rows: In the order of the logits.
            device: Where the logits are.
            penalty: The model's own, on tokens that have been there.
        """
        self.rows = tuple(rows)
        self._device, self._penalty = device, penalty
        samplers = [row.sampler for row in rows]
        self._sampled = [i for i, sampler in enumerate(samplers) if not sampler.is_greedy]
        self._held = [i for i, row in enumerate(rows) if row.constraint is not None]
        self._seen_BT: Tensor | None = None
        """The tokens before; made in the first step, one longer in each."""
        self._mask_table = build_mask_table(device) if self._held else torch.empty(0)
        self._sampled_S = self._temperatures_S1 = torch.empty(0)
        if self._sampled:
            temperatures_S = np.array([samplers[i].temperature for i in self._sampled], np.float32)
            packed = np.stack([np.array(self._sampled, np.int32), temperatures_S.view(np.int32)])
            placed_2S = to_device(torch.from_numpy(packed), device)
            self._sampled_S = placed_2S[0]
            self._temperatures_S1 = placed_2S[1].view(torch.float32)[:, None]

    def choose(self, logits_BV: Tensor) -> list[int]:
        """Return the next token of each row.

        Args:
            logits_BV: Float32; changed in place where rows are held to a grammar.
        """
        logits_BV = self._apply_rules(logits_BV)
        parts = []
        if len(self._sampled) < len(self.rows):
            parts.append(logits_BV.argmax(-1).int())
        logits_SV = logits_BV
        if self._sampled:
            if len(self._sampled) < len(self.rows):
                logits_SV = logits_BV.index_select(0, self._sampled_S)
            parts.append(_summarize(logits_SV, self._temperatures_S1).flatten())
        found = (torch.cat(parts) if len(parts) > 1 else parts[0]).cpu().numpy()
        tokens: list[int] = found[: len(self.rows)].tolist()
        if not self._sampled:
            return tokens
        if len(parts) > 1:
            found = found[len(self.rows) :]
        for s, (row, summary) in enumerate(
            zip(self._sampled, found.reshape(len(self._sampled), -1), strict=True)
        ):
            tokens[row] = _draw(self.rows[row], summary, logits_SV[s])
        return tokens

    def _apply_rules(self, logits_BV: Tensor) -> Tensor:
        """Take out what grammars refuse, and apply the penalty; with one copy to the device."""
        held = [c for i in self._held if (c := self.rows[i].constraint) is not None]
        parts: list[NDArray[np.int64]] = []
        if held:
            parts.append(pack_masks(held, num_logits=logits_BV.shape[1]).view(np.int64).ravel())
        num_mask_words = len(parts[0]) if parts else 0
        if self._penalty is not None:
            parts.append(self._unseen().ravel())
        if not parts:
            return logits_BV
        words = to_device(torch.from_numpy(np.concatenate(parts)), self._device)
        if held:
            masks_HW = words[:num_mask_words].view(torch.uint8).view(len(held), -1)
            bias_HV = expand_masks(masks_HW, self._mask_table, num_logits=logits_BV.shape[1])
            for h, row in enumerate(self._held):
                logits_BV[row].add_(bias_HV[h])
        if self._penalty is not None:
            new_BT = words[num_mask_words:].view(len(self.rows), -1)
            seen = self._seen_BT
            self._seen_BT = new_BT if seen is None else torch.cat([seen, new_BT], 1)
            logits_BV = self._penalty(self._seen_BT, logits_BV)
        return logits_BV

    def _unseen(self) -> NDArray[np.int64]:
        """Return the tokens that are not in `_seen_BT` yet, as many for each row."""
        if self._seen_BT is not None:
            return np.array([[row.ids[-1]] for row in self.rows], np.int64)
        before = [[*row.prompt_ids, *row.ids] for row in self.rows]
        longest = max(map(len, before))
        # A token that is there twice counts once.
        return np.array([ids + ids[:1] * (longest - len(ids)) for ids in before], np.int64)


def _summarize(logits_SV: Tensor, temperatures_S1: Tensor) -> Tensor:
    """Return the likeliest tokens of each row and the sum of all weights, as int32 [S, 2C + 1].

    Floating-point numbers stand there by their bits, which no device may then round or flush.
    """
    num = min(FIRST_CANDIDATES, logits_SV.shape[1])
    logits_SC, ids_SC = logits_SV.topk(num)
    weights_SV = logits_SV.sub(logits_SC[:, :1]).div_(temperatures_S1).exp_()
    floats = torch.cat([logits_SC, weights_SV.sum(-1, keepdim=True)], 1).view(torch.int32)
    return torch.cat([floats, ids_SC.int()], 1)


def _draw(row: Row, summary: NDArray[np.int32], logits_V: Tensor) -> int:
    num = len(summary) // 2
    floats = summary[: num + 1].view(np.float32)
    ids_C = summary[num + 1 :]
    total = float(floats[num])
    if not np.isfinite(total):
        # The model's numbers are none: there is no distribution to draw from.
        return int(ids_C[0])
    first = Candidates.rank(
        floats[:num],
        ids_C,
        temperature=row.sampler.temperature,
        total=total,
        are_all=num == logits_V.shape[0],
    )
    return row.sampler.draw(first, lambda: logits_V, position=len(row.ids))
