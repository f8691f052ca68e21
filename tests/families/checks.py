"""What must hold for every family; each check takes a built folder and its case."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from grit_core.data.collate import Batch, collate_batches
from grit_core.data.encoder import IGNORED, EncodedRow
from grit_core.data.image_decoding import decode_image
from grit_core.errors import ModelUnavailable
from grit_core.events import AdapterSaved, Evaluated, StepCompleted, TrainingFinished
from grit_core.generation import AdapterSource, GenerationEngine, GenerationRequest
from grit_core.loss import label_loss_sum
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.models.vlm_adapter import inject_lora, lora_layers
from grit_core.records import parse_prompt
from grit_core.serving.ticket import Ticket
from tests.families import chats
from tests.families.case import FamilyCase
from tests.families.subjects import (
    Trained,
    base_model,
    encode,
    encoder_for,
    plan_for,
    random_adapter,
    register,
    run_training,
)

NUM_ANSWER_TOKENS = 10
LOSS_TOLERANCE = 1e-4
"""Relative, in float32: padding and the order of a batch change the last bits of a sum."""


def check_registration(folder: Path, case: FamilyCase) -> None:
    """It is registered, or refused in the words that the case expects."""
    if case.refusal is not None:
        with pytest.raises(ModelUnavailable) as refusal:
            register(folder)
        assert re.search(case.refusal, str(refusal.value)), str(refusal.value)
        return
    inventory = register(folder)
    assert inventory.model_type == case.model_type
    assert inventory.layers
    assert base_model(folder) is not None


def check_plan(folder: Path, case: FamilyCase) -> None:
    """The preset or the defaults adapt layers of every part, and each gets a gradient."""
    config, plan = plan_for(folder, case)
    planned = {layer.modality.value for layer in plan.layers}
    configured = {
        name for name in ("vision", "text", "cross_modal", "fusion") if getattr(config, name)
    }
    assert planned == configured
    model = inject_lora(load_base_model(folder), plan, seed=0).eval()
    rows = [row for chat in _lone_turns(case) for row in encode(folder, chat)]
    _loss_sum(model, folder, rows).backward()
    gradients = {
        name: layer.lora_B["default"].weight.grad for name, layer in lora_layers(model).items()
    }
    without = [name for name, grad in gradients.items() if grad is None or not grad.any()]
    assert not without, f"no gradient reaches {without}"
    assert len(gradients) == len(plan.layers) > 0


def check_labels(folder: Path, case: FamilyCase) -> None:
    """Exactly the assistant's words and the end of its turn are labels, in every form of chat."""
    tokenizer = encoder_for(folder).renderer.tokenizer
    end = tokenizer.eos_token if case.end is None else case.end
    for chat in chats.conversations(case):
        rows = encode(folder, chat)
        found = [tokenizer.decode(run).strip() for row in rows for run in _label_runs(row)]
        words = [turn["content"] for turn in chat if turn["role"] == "assistant"]
        expected = [_squeezed(word + end) for word in words]
        if not case.ends_every_turn:
            found[:-1] = [text.removesuffix(end) + end for text in found[:-1]]
        assert [_squeezed(text) for text in found] == expected
        prompt = _prompt_ids(folder, chat[:-1])
        assert rows[-1].input_ids[: len(prompt)].tolist() == prompt, (
            "inference sends another prompt"
        )


def check_three_steps(folder: Path, case: FamilyCase) -> None:
    """Three steps on rows of each number of images, and on all of them mixed, give an adapter."""
    counts = case.image_counts()
    kinds = [(count, count, count) for count in counts]
    for kind in [*kinds, counts + counts] if len(kinds) > 1 else kinds:
        _check_run(_trained(folder, case, kind))


def check_mixed_training(folder: Path, case: FamilyCase) -> None:
    """The shortest form of the above: rows of every number of images in one batch."""
    _check_run(_trained(folder, case, case.image_counts() * 2))


def check_plain_peft_equals(folder: Path, case: FamilyCase) -> None:
    """The saved adapter under plain PEFT has the loss of the trained model, and not the base's."""
    trained = _trained(folder, case, case.image_counts() * 2)
    [evaluated] = [event for event in trained.events if isinstance(event, Evaluated)]
    rows = [row for chat in _mixed(case) for row in encode(folder, chat)]
    plain = PeftModel.from_pretrained(load_base_model(folder), str(trained.adapter)).eval()
    assert _mean_loss(plain, rows) == pytest.approx(evaluated.eval_loss, rel=LOSS_TOLERANCE)
    assert _mean_loss(base_model(folder), rows) != pytest.approx(evaluated.eval_loss, rel=1e-3)


def check_batch_loss_is_sum_of_lone_rows(folder: Path, case: FamilyCase) -> None:
    """Rows of unequal lengths and numbers of images share a batch without changing their losses."""
    rows = [row for chat in _mixed(case) for row in encode(folder, chat)]
    assert len({len(row.input_ids) for row in rows}) > 1
    model = base_model(folder)
    with torch.no_grad():
        lone = [float(_loss_sum(model, folder, [row])) for row in rows]
        together = float(_loss_sum(model, folder, rows))
        backward = float(_loss_sum(model, folder, rows[::-1]))
    assert together == pytest.approx(sum(lone), rel=LOSS_TOLERANCE)
    assert backward == pytest.approx(sum(lone), rel=LOSS_TOLERANCE)


def check_rows_join_as_the_processor_does(folder: Path, case: FamilyCase) -> None:
    """Rows that were encoded one by one make the batch that the processor makes of all of them."""
    counts = [count for count in (1, 2, 1) if count in case.image_counts()]
    kinds = [[count] * 2 for count in set(counts)] if "cross_attention" in case.traits else [counts]
    for kind in kinds if counts else []:
        asked = [chat[:1] for chat in _turns(tuple(kind))]
        rows = [_prompt_row(folder, chat) for chat in asked]
        [batch] = _batches(folder, rows)
        whole = _plain_inputs(folder, case, *asked)
        assert batch.inputs.keys() == whole.keys()
        tokens = whole["attention_mask"].bool()
        for name, values in whole.items():
            joined = batch.inputs[name]
            assert joined.shape == values.shape, name
            if values.shape[:2] == tokens.shape:  # what stands at padding is of no account
                joined, values = joined[tokens], values[tokens]  # noqa: PLW2901
            assert torch.equal(joined, values), name


def check_answers_equal_generate(folder: Path, case: FamilyCase) -> None:
    """Greedy answers are those of plain transformers, token by token, and depend on the images."""
    with Engine() as engine:
        for count in case.image_counts():
            chat = chats.lone_turn(count, number=1)[:1]
            expected = _plain_answer(folder, case, chat)
            assert len(expected) >= 8, f"{case.name} ends its answer after {len(expected)} tokens"
            for again in range(2):  # the second time with what was kept of the first
                assert engine.answer(folder, chat) == expected, (count, again)
    if case.reads_images:
        shown = [chats.user_turn("What is this?", index) for index in (1, 4)]
        logits = [_last_logits(folder, case, [turn]) for turn in shown]
        assert not torch.allclose(*logits, rtol=1e-3, atol=1e-3), "the image changes nothing"


def check_mixed_batch(folder: Path, case: FamilyCase) -> None:
    """Two adapters and the base answer chats of every kind together as each does on its own."""
    sources = [None, *(random_adapter(folder, case, seed=seed) for seed in (1, 2))]
    asked = [chats.lone_turn(count, number=2)[:1] for count in case.image_counts()]
    pairs = [(chat, source) for chat in asked for source in sources]
    with Engine() as engine:
        alone = [engine.answer(folder, chat, adapter=source) for chat, source in pairs]
    first = alone[: len(sources)]
    assert len({tuple(ids) for ids in first}) == len(sources), "the adapters change nothing"
    with Engine() as engine, ThreadPoolExecutor(len(pairs)) as pool:
        together = list(
            pool.map(lambda pair: engine.answer(folder, pair[0], adapter=pair[1]), pairs)
        )
    assert together == alone


class Engine:
    """An engine whose answers are token ids."""

    def __init__(self, *, device: str = "cpu") -> None:
        self._device = device

    def __enter__(self) -> "_WatchedEngine":
        self._made = _WatchedEngine(device=self._device)
        return self._made

    def __exit__(self, *_: object) -> None:
        self._made.close()


class _WatchedEngine(GenerationEngine):
    """Keeps the tickets of its requests, which hold the tokens of the answers."""

    def __init__(self, *, device: str) -> None:
        super().__init__(device=device)
        self._tickets: dict[int, Ticket] = {}

    def _submit(self, ticket: Ticket) -> None:
        self._tickets[id(ticket.request)] = ticket
        super()._submit(ticket)

    def answer(
        self, folder: Path, chat: list[dict[str, Any]], *, adapter: AdapterSource | None = None
    ) -> list[int]:
        request = GenerationRequest(chat=parse_prompt(chat), max_new_tokens=NUM_ANSWER_TOKENS)
        generation = self.generate(str(folder), request, adapter=adapter)
        ids = self._tickets.pop(id(request)).ids
        assert generation.completion_tokens == len(ids)
        return ids


def _check_run(trained: Trained) -> None:
    steps = [event for event in trained.events if isinstance(event, StepCompleted)]
    assert [event.step for event in steps] == [1, 2, 3]
    assert all(math.isfinite(event.train_loss) and event.train_loss > 0 for event in steps)
    assert isinstance(trained.events[-2], AdapterSaved)
    assert isinstance(trained.events[-1], TrainingFinished)
    assert (trained.adapter / "adapter_model.safetensors").is_file()


_RUNS: dict[tuple[Path, tuple[int, ...]], Trained] = {}


def _trained(folder: Path, case: FamilyCase, counts: tuple[int, ...]) -> Trained:
    """Train once for every folder and kind of rows."""
    if (folder, counts) not in _RUNS:
        name = "-".join(["trained", *map(str, counts)])
        rows = [{"messages": chat} for chat in _turns(counts)]
        _RUNS[folder, counts] = run_training(
            folder, case, rows, work=folder.parent / f"{folder.name}-{name}", batch_size=len(counts)
        )
    return _RUNS[folder, counts]


def _turns(counts: tuple[int, ...]) -> list[list[dict[str, Any]]]:
    return [chats.lone_turn(count, number=number) for number, count in enumerate(counts, 1)]


def _mixed(case: FamilyCase) -> list[list[dict[str, Any]]]:
    return _turns(case.image_counts() * 2)


def _lone_turns(case: FamilyCase) -> list[list[dict[str, Any]]]:
    return _turns(case.image_counts())


def _batches(folder: Path, rows: list[EncodedRow]) -> tuple[Batch, ...]:
    """The rows in as few batches as training would make of them."""
    return collate_batches(
        rows, batch_size=len(rows), pad_token_id=encoder_for(folder).pad_token_id
    )


def _loss_sum(model: Any, folder: Path, rows: list[EncodedRow]) -> torch.Tensor:
    losses = [label_loss_sum(model, batch) for batch in _batches(folder, rows)]
    return torch.stack(losses).sum()


def _label_runs(row: EncodedRow) -> list[list[int]]:
    """The tokens of each unbroken range of labels."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [run for run in runs if run]


def _squeezed(text: str) -> str:
    """Without white space, which templates put between words and the end of a turn."""
    return "".join(text.split())


def _mean_loss(model: torch.nn.Module, rows: list[EncodedRow]) -> float:
    """The mean over label tokens by the model's own forward, a row at a time."""
    total, count = 0.0, 0
    for row in rows:
        targets = row.labels[1:]
        with torch.no_grad():
            output = model(
                input_ids=row.input_ids[None],
                attention_mask=torch.ones_like(row.input_ids)[None],
                **row.features,
            )
        losses = torch.nn.functional.cross_entropy(
            output.logits[0, :-1].float(), targets, ignore_index=IGNORED, reduction="sum"
        )
        total += float(losses)
        count += int((targets != IGNORED).sum())
    return total / count


def _plain_inputs(
    folder: Path, case: FamilyCase, *asked: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Chats as the processor of transformers makes them, by the steps of its documentation."""
    processor = load_processor(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    seeing = tokenizer is not processor
    records = [parse_prompt(chat) for chat in asked]
    images = [
        [decode_image(data, index=index) for index, data in enumerate(record.images)]
        for record in records
    ]
    if case.write_prompt is not None:
        texts = [
            case.write_prompt(record.messages[0].text, len(record.images)) for record in records
        ]
    else:
        texts = [
            processor.apply_chat_template(
                [_plain_message(turn, seeing=seeing) for turn in chat],
                tokenize=False,
                add_generation_prompt=True,
            )
            for chat in asked
        ]
    options: dict[str, Any] = {"return_tensors": "pt"}
    if len(texts) > 1:
        options |= {"padding": True, "padding_side": "right"}
    if tokenizer.bos_token and texts[0].startswith(tokenizer.bos_token):
        options["add_special_tokens"] = False
    if not seeing:
        return dict(processor(texts, **options))
    shown = {"images": images} if any(images) else {}
    inputs = processor(text=texts, **shown, **options)
    precision = base_model(folder).dtype
    return {
        name: values.to(precision) if values.is_floating_point() else values
        for name, values in inputs.items()
        if name != "labels"
    }


def _plain_message(turn: dict[str, Any], *, seeing: bool) -> dict[str, Any]:
    content = turn["content"]
    if not seeing:
        return turn
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
    return {"role": turn["role"], "content": parts}


def _prompt_row(folder: Path, chat: list[dict[str, Any]]) -> EncodedRow:
    """A prompt of ours as a row without labels."""
    record = parse_prompt(chat)
    images = [decode_image(data, index=index) for index, data in enumerate(record.images)]
    features = encoder_for(folder).encode_prompt(record.messages, images)
    input_ids = features.pop("input_ids")[0]
    del features["attention_mask"]
    labels = torch.full_like(input_ids, IGNORED)
    return EncodedRow(input_ids=input_ids, labels=labels, features=features)


def _prompt_ids(folder: Path, chat: list[dict[str, Any]]) -> list[int]:
    return _prompt_row(folder, chat).input_ids.tolist()


def _plain_answer(folder: Path, case: FamilyCase, chat: list[dict[str, Any]]) -> list[int]:
    inputs = _plain_inputs(folder, case, chat)
    model = load_base_model(folder)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NUM_ANSWER_TOKENS, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return output[0, length:].tolist()


def _last_logits(folder: Path, case: FamilyCase, chat: list[dict[str, Any]]) -> torch.Tensor:
    with torch.no_grad():
        return base_model(folder)(**_plain_inputs(folder, case, chat)).logits[0, -1]
