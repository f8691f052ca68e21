"""The peer: LoRA by PEFT and AdamW by torch, with nothing of ours but the order of the rows.

It writes chats and finds labels in a way of its own, so that equal losses say that both are right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real.library import chat
from grit_core.sampler import Sampler

IGNORED = -100
MAX_GRAD_NORM = 1.0
EVALUATION_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the service's jobs and the peer have in common. The rate is constant."""

    steps: int = 32
    rows_per_step: int = 8
    learning_rate: float = 1e-3
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    seed: int = 0


class PlainModel:
    """One base model, loaded once for each use, and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer."""
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def load(self) -> Any:
        """Return a fresh float32 model."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def batch(self, rows: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Write rows as the template does; labels are the answer and the token that ends it."""
        ids, labels = [], []
        for question, answer in rows:
            messages = chat(question, answer)
            prompt = self._ids(messages[:1], add_generation_prompt=True)
            whole = self._ids(messages, add_generation_prompt=False)
            end = len(whole) - whole[::-1].index(self.tokenizer.eos_token_id)
            assert whole[: len(prompt)] == prompt
            ids.append(torch.tensor(whole))
            outside = [IGNORED] * (len(whole) - end)
            labels.append(
                torch.tensor([IGNORED] * len(prompt) + whole[len(prompt) : end] + outside)
            )
        lengths = torch.tensor([len(row) for row in ids])
        input_ids = pad_sequence(ids, batch_first=True, padding_value=0)
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def _ids(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def loss(self, model: nn.Module, rows: Sequence[tuple[str, str]]) -> float:
        """Return the mean loss over the label tokens of some rows."""
        model.eval()
        total, count = 0.0, 0
        for start in range(0, len(rows), EVALUATION_BATCH):
            batch = self.batch(rows[start : start + EVALUATION_BATCH])
            tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
        return total / count

    def adapter_loss(self, adapter: Path | None, rows: Sequence[tuple[str, str]]) -> float:
        """Return the loss with a saved adapter, as PEFT loads it, or without one."""
        model = self.load()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        return self.loss(model, rows)


def train(
    plain: PlainModel, rows: Sequence[tuple[str, str]], settings: Settings
) -> tuple[nn.Module, list[float]]:
    """Train; return the model and the loss of each step's rows before the step."""
    torch.manual_seed(settings.seed)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets),
        lora_dropout=0.0,
    )
    model = get_peft_model(plain.load(), lora)
    model.train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    sampler = Sampler(
        rows=tuple(range(len(rows))), rows_per_step=settings.rows_per_step, seed=settings.seed
    )
    losses = []
    for step in range(settings.steps):
        batch = plain.batch([rows[index] for index in sampler.rows_of(step)])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses
