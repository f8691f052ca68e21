"""Try a base model out before any job names it: its weights, its processor, its default layers.

The model is built on the meta device, the headers of its weights are compared with it, rows with
and without images are encoded, and LoRA is put on the layers of the family's default preset. What
fails would fail every job; here it is the model's failure, in words, at registration. No weights
are read and no code of the model's runs.
"""

import dataclasses
import inspect
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig

from grit_core.config.model_configs import Modality, ModalityConfig, ModelGRITConfig
from grit_core.data.collate import collate
from grit_core.data.encoder import IGNORED, ChatEncoder, EncodedRow
from grit_core.data.end_of_turn import describe_chat_format
from grit_core.data.image_decoding import decode_image
from grit_core.errors import InvalidConfig, ModelUnavailable, NoLayersMatched
from grit_core.inventory import ModelInventory, ProbeFacts
from grit_core.library_errors import reason
from grit_core.matching import default_patterns
from grit_core.model_refusals import count_embeddings
from grit_core.models.inventory import (
    build_meta_model,
    inventory_of,
    refuse_without_layers,
)
from grit_core.models.pretrained import is_folder, load_processor
from grit_core.models.vlm_adapter import inject_lora
from grit_core.models.weights import compare_weights
from grit_core.plan import AdaptationPlan, plan_adaptation
from grit_core.records import ChatRecord, ImagePart, Message, Role, TextPart

QUESTION: Final = "What is shown here?"
ANSWER: Final = "A small test picture."
MAX_IMAGES: Final = 2
"""Rows with up to so many images are tried."""

IMAGE_SIZE_PIXELS: Final = (96, 64)
"""Width and height of the probe's image: not square, and of a few patches for every family."""


def probe_model(source: str | Path) -> ModelInventory:
    """Build a base model without its weights and try out what every job does with it.

    A model that cannot be trained raises `ModelUnavailable`, which says what fails, why, and what
    to do about it.

    Args:
        source: A local folder or a hub id. A folder is read without any network.

    Returns:
        The layers, with what the probe has shown in `probe`.
    """
    with _failing_as(f"The model {source} cannot be built"):
        model = build_meta_model(source)
        inventory = inventory_of(model)
    refuse_without_layers(inventory, source)
    with _failing_as(f"The weights of {source} cannot be compared with config.json"):
        notes = compare_weights(source, model)
    with _failing_as(f"The processor of {source} cannot be loaded"):
        processor = load_processor(source)
        encoder = ChatEncoder(processor)
    rows, encoding_notes = _encode_rows(source, model, encoder)
    with _failing_as(f"The chat template of {source} cannot be used"):
        chat_format = describe_chat_format(processor, _eos_token_ids(source, model))
    # The last, because it changes the model.
    default_layers, plan_notes = _adapt(source, model, inventory)
    facts = ProbeFacts(
        takes_text_only=0 in rows,
        max_images=max(rows),
        image_tokens=None if 1 not in rows else _image_tokens(rows[1], model, encoder),
        default_layers=default_layers,
        notes=(*notes, *encoding_notes, *plan_notes),
    )
    return dataclasses.replace(inventory, chat_format=chat_format.to_json(), probe=facts)


def _eos_token_ids(source: str | Path, model: Any) -> list[int]:
    """Return the tokens at which the model's generation ends, by its own settings."""
    options = {"local_files_only": True} if is_folder(source) else {}
    try:
        settings = GenerationConfig.from_pretrained(source, **options)
    except OSError:  # it has no generation_config.json
        settings = model.generation_config
    eos = settings.eos_token_id
    return list(eos) if isinstance(eos, list) else [] if eos is None else [eos]


# --- rows


def _encode_rows(
    source: str | Path, model: nn.Module, encoder: ChatEncoder
) -> tuple[dict[int, EncodedRow], list[str]]:
    """Encode rows without an image and, for an image model, with one and with two.

    Returns:
        The rows by their number of images, and notes on those that cannot be encoded.

    Raises:
        ModelUnavailable: A text model cannot encode text, or an image model cannot encode an image.
    """
    sees = hasattr(model.config, "vision_config") or encoder.inputs.reads_images
    rows: dict[int, EncodedRow] = {}
    refused: dict[int, str] = {}
    for count in range(MAX_IMAGES + 1 if sees else 1):
        try:
            rows[count] = _encode(encoder, count)
        except Exception as error:  # noqa: BLE001 - a processor may raise anything; it is reported
            refused[count] = _words(error)
        else:
            _check_row(source, model, encoder, rows[count], num_images=count)
    needed = 1 if sees else 0
    if needed in refused:
        raise ModelUnavailable(_not_encoded(source, encoder, needed, refused[needed]))
    if 1 in rows:
        _check_batch(source, encoder, rows[1])
    notes = []
    if 0 in refused:
        notes.append(f"Every row needs an image: {refused[0]}.")
    if MAX_IMAGES in refused:
        notes.append(f"A row may show one image: {refused[MAX_IMAGES]}.")
    tokens, known = len(encoder.renderer.tokenizer), count_embeddings(model)
    if known is not None and tokens > known:
        notes.append(
            f"The tokenizer has {tokens} tokens and the model {known} embeddings: rows that hold"
            " one of the last tokens cannot be trained on."
        )
    return rows, notes


def _question(num_images: int) -> Message:
    shown = tuple(ImagePart(index) for index in range(num_images))
    return Message(Role.USER, (*shown, TextPart(QUESTION)))


def _encode(encoder: ChatEncoder, num_images: int) -> EncodedRow:
    messages = (_question(num_images), Message(Role.ASSISTANT, (TextPart(ANSWER),)))
    record = ChatRecord(line=1, messages=messages, images=_images(num_images))
    return encoder.encode(record)[0]


def _images(count: int) -> tuple[bytes, ...]:
    """PNGs with a gradient, so that no scaling divides by a spread of zero."""
    width, height = IMAGE_SIZE_PIXELS
    pictures = []
    for index in range(count):
        red = Image.linear_gradient("L").resize((width, height))
        green, blue = red.rotate(180), Image.new("L", (width, height), 64 * (index + 1))
        buffer = io.BytesIO()
        Image.merge("RGB", (red, green, blue)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return tuple(pictures)


def _check_row(
    source: str | Path,
    model: nn.Module,
    encoder: ChatEncoder,
    row: EncodedRow,
    *,
    num_images: int,
) -> None:
    """Compare an encoded row with the model that would read it.

    Raises:
        ModelUnavailable: No token is learned, the model lacks an embedding or an argument, or its
            image tokens are others.
    """
    with_images = f"a row with {num_images} images" if num_images else "a row without an image"
    start = f"The processor of {source} does not fit its model: {with_images}"
    if not (row.labels != IGNORED).any():
        raise ModelUnavailable(f"{start} has no token of the assistant's to learn.")
    if not _answer_is_learned(encoder, row):
        raise ModelUnavailable(
            f"{start} does not teach the assistant's words; look at its chat template."
        )
    image_ids = _image_token_ids(model, encoder)
    known = count_embeddings(model)
    ids = row.input_ids[~torch.isin(row.input_ids, torch.tensor(image_ids, dtype=torch.long))]
    if known is not None and len(ids) and int(ids.max()) >= known:
        raise ModelUnavailable(
            f"{start} has the token {int(ids.max())}, and the model has {known} embeddings; the"
            " tokenizer is another model's, or the embeddings were not resized after tokens were"
            " added."
        )
    unknown = _unknown_arguments(model, row.features)
    if unknown:
        raise ModelUnavailable(
            f"{start} comes with {', '.join(unknown)}, which {type(model).__name__} does not take;"
            " the processor is another model's."
        )
    declared = _declared_image_token(model)
    if num_images and declared is not None and not (row.input_ids == declared).any():
        raise ModelUnavailable(
            f"{start} has no token {declared}, which config.json declares as the image's"
            " (image_token_id); the tokenizer or the chat template is another model's."
        )
    for name, values in row.features.items():
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise ModelUnavailable(
                f"{start} has {name} that are not finite; look at image_mean and image_std of the"
                " image processor's configuration."
            )


def _check_batch(source: str | Path, encoder: ChatEncoder, row: EncodedRow) -> None:
    """Join a row with itself, and compare what its image became with the processor's own batch.

    Raises:
        ModelUnavailable: The processor joins images otherwise, so a batch would show the model
            other images than its rows do.
    """
    image = decode_image(_images(1)[0], index=0)
    try:
        text = encoder.renderer.prompt([_question(1)])
        whole = encoder.renderer.processor(
            text=[text, text],
            images=[[image], [image]],
            return_tensors="pt",
            add_special_tokens=False,
        )
    except Exception:  # noqa: BLE001 - a processor of lone rows has no batch to compare with
        return
    joined = collate([row, row], pad_token_id=encoder.pad_token_id).inputs
    tokens = whole["input_ids"].shape
    for name, values in joined.items():
        own = whole.get(name)
        if not isinstance(own, torch.Tensor) or own.shape[:2] == tokens:
            continue
        if own.shape != values.shape:
            raise ModelUnavailable(
                f"The processor of {source} joins {name} of two rows to {list(own.shape)}, and a"
                f" batch here would have {list(values.shape)}; rows of such models cannot be"
                " trained together."
            )


def _answer_is_learned(encoder: ChatEncoder, row: EncodedRow) -> bool:
    """Look for the answer in the decoded labels, white space and case aside."""
    tokenizer = encoder.renderer.tokenizer
    learned = row.labels[row.labels != IGNORED]
    if tokenizer.unk_token_id is not None and (learned == tokenizer.unk_token_id).any():
        return True  # this vocabulary cannot write the probe's words
    text = "".join(tokenizer.decode(learned.tolist()).split()).lower()
    return "".join(ANSWER.split()).lower() in text


def _image_tokens(row: EncodedRow, model: nn.Module, encoder: ChatEncoder) -> int:
    ids = torch.tensor(_image_token_ids(model, encoder), dtype=torch.long)
    return int(torch.isin(row.input_ids, ids).sum())


def _image_token_ids(model: nn.Module, encoder: ChatEncoder) -> list[int]:
    """Return the ids that stand for images, by the model's config and by the processor."""
    declared = _declared_image_token(model)
    own = [] if declared is None else [declared]
    return sorted({*own, *encoder.image_token_ids.tolist()})


def _declared_image_token(model: nn.Module) -> int | None:
    for name in ("image_token_id", "image_token_index"):
        declared = getattr(model.config, name, None)
        if isinstance(declared, int):
            return declared
    return None


def _unknown_arguments(model: nn.Module, features: Mapping[str, Any]) -> list[str]:
    parameters = inspect.signature(model.forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return []
    return sorted(name for name in features if name not in parameters)


def _not_encoded(source: str | Path, encoder: ChatEncoder, num_images: int, why: str) -> str:
    if num_images and not encoder.inputs.reads_images:
        return (
            f"The model {source} reads images and its folder holds only a tokenizer; add the image"
            " processor's files (preprocessor_config.json or processor_config.json)."
        )
    row = "with an image" if num_images else "of text"
    return (
        f"The processor of {source} cannot encode a row {row}, so no row could be trained on: {why}"
    )


# --- the default layers


def _adapt(
    source: str | Path, model: nn.Module, inventory: ModelInventory
) -> tuple[int, list[str]]:
    """Put LoRA on the family's default layers, or on one layer of each kind without a default.

    Returns how many layers the family's defaults reach, and notes. Default layers that cannot be
    adapted raise `ModelUnavailable`.
    """
    plan, notes = _default_plan(inventory)
    if plan is None:
        return 0, [*notes, *_try_each_kind(model, inventory)]
    with _failing_as(f"The default layers of {source} cannot be adapted"):
        inject_lora(model, plan)
    return len(plan.layers), notes


def _default_plan(inventory: ModelInventory) -> tuple[AdaptationPlan | None, list[str]]:
    """Plan the default patterns of every modality that the model has, with notes on misfits."""
    fitting: dict[str, Any] = {"global_rank": 1}
    notes = []
    for modality in Modality:
        patterns = default_patterns(modality, inventory) if inventory.of(modality) else []
        if not patterns:
            continue
        wanted: dict[str, Any] = {"global_rank": 1, modality.value: ModalityConfig()}
        try:
            plan_adaptation(ModelGRITConfig(**wanted), inventory)
        except NoLayersMatched:
            notes.append(
                f"The default {modality} patterns of {inventory.model_type} match no layer of this"
                f" model ({', '.join(patterns)}), so its presets do not fit: give layer_patterns."
            )
        else:
            fitting |= wanted
    if len(fitting) == 1:
        note = (
            f"No default layers are known for the model type {inventory.model_type}: a job needs"
            " layer_patterns of its own."
        )
        return None, [*notes, note]
    return plan_adaptation(ModelGRITConfig(**fitting), inventory), notes


def _try_each_kind(model: nn.Module, inventory: ModelInventory) -> list[str]:
    """Adapt the first layer of every kind (names that differ in numbers are of one kind)."""
    kinds: dict[str, str] = {}
    head = _output_layer_name(model)
    for layer in inventory.layers:
        if layer.name == head:  # often tied to the embeddings, and adapted by no default
            continue
        kind = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
        kinds.setdefault(kind, layer.name)
    try:
        inject_lora(model, _plan_by_names(inventory, list(kinds.values())))
    except Exception as error:  # noqa: BLE001 - it stops no job that leaves the layer out
        return [f"Not every layer can be adapted: {_words(error)}"]
    return []


def _output_layer_name(model: Any) -> str | None:
    head = model.get_output_embeddings()
    names = (name for name, module in model.named_modules() if module is head)
    return next(names, None)


def _plan_by_names(inventory: ModelInventory, names: Sequence[str]) -> AdaptationPlan:
    config = ModelGRITConfig(global_rank=1)
    return plan_adaptation(config, inventory, overrides={Modality.TEXT: names})


# --- failures


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Turn every exception into the model's failure.

    Raises:
        ModelUnavailable: Anything went wrong.
    """
    try:
        yield
    except ModelUnavailable:
        raise
    except Exception as error:
        raise ModelUnavailable(f"{what}: {_words(error)}") from error


def _words(error: Exception) -> str:
    """Return an exception's own words where it is one of ours, else its class and first line."""
    ours = isinstance(error, ModelUnavailable | InvalidConfig) or type(error).__module__.startswith(
        "grit_core."
    )
    return str(error).strip().rstrip(".")[:1000] if ours else reason(error)
