"""Load a base model and its processor: from a local folder or by hub id, safetensors only."""

import gc
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.hub import cached_file, extract_commit_hash

from grit_core.config.bounds import Choice
from grit_core.config.devices import inference_precision
from grit_core.data.chat_template import plain_template
from grit_core.data.paligemma import find_template
from grit_core.data.processor import CONFIG_IMAGE_IDS
from grit_core.errors import InvalidConfig, ModelUnavailable
from grit_core.library_errors import is_device_failure, ran_out_of_memory, reason
from grit_core.models.missing_packages import explain_missing_packages
from grit_core.models.processor_parts import assemble, find_processor_class, has_unused_parts
from grit_core.models.quantization import refuse_quantized
from grit_core.models.torch_device import open_device

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The precisions of a job, by their wire names."""

_REPORTING: Final = "_finalize_model_loading"
"""The function of transformers that raises what went wrong while tensors were converted."""


def load_base_model(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32"
) -> nn.Module:
    """Load the weights of a base model, in evaluation mode and with every parameter frozen.

    Args:
        source: A local folder (absolute, or relative and existing) or a hub id such as
            `HuggingFaceTB/SmolVLM-256M-Instruct`. Folders are read without any network.
        device: Where the weights go, one tensor after the other: this machine's memory never
            holds all of them for another device.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for what inference takes there.

    A device that is not there or cannot be used raises `DeviceUnavailable`; one without room for
    the weights `torch.OutOfMemoryError`, and those that were on it are gone by then. Errors of a
    device that has failed pass as torch raised them.

    Raises:
        InvalidConfig: There is no such dtype.
        ModelUnavailable: Nothing usable is there; the message says what is missing.
        MemoryError: This machine's memory is full, which is no fault of the model.
    """
    fault = Choice(values=("auto", *DTYPES)).fault(dtype, pointer="/dtype")
    if fault is not None:
        raise InvalidConfig([fault])
    options = _options(source)
    place = open_device(device)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        refuse_quantized(config, source)
        if dtype == "auto":
            # torch numbers the one device of MPS too.
            name = str(place) if place.type == "cuda" else place.type
            dtype = inference_precision(name, model_types=_model_types(config))
        if place.type != "cpu":
            options["device_map"] = {"": place}
        model, report = _auto_model_for(config).from_pretrained(
            source,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (ModelUnavailable, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a user's files can fail anywhere in transformers
        failure = _failure(source, place, error)
    else:
        missing = sorted(report["missing_keys"])
        if not missing:
            loaded: nn.Module = model.eval().requires_grad_(requires_grad=False)
            return loaded
        failure = ModelUnavailable(
            f"The weights of {source} lack {len(missing)} tensors of its architecture, such as"
            f" {', '.join(missing[:3])}; they would be random."
        )
    # Not inside of `except`: the first error's frames hold the weights that are loaded already, and
    # the futures that they were read by hold the error.
    gc.collect()
    raise failure


def read_model_types(source: str | Path) -> frozenset[str]:
    """Return the `model_type` of a base model and of its text model, as in its config.json.

    Raises:
        ModelUnavailable: It cannot be read.
    """
    options = _options(source)
    try:
        return _model_types(AutoConfig.from_pretrained(source, **options))
    except Exception as error:  # as above
        raise ModelUnavailable(_reason("model", source, error)) from error


def _model_types(config: Any) -> frozenset[str]:
    parts = (config, getattr(config, "text_config", None) or config)
    return frozenset(str(part.model_type) for part in parts)


def _failure(source: str | Path, device: torch.device, error: Exception) -> Exception:
    """Return what a caller reads of an error while weights were loaded."""
    cause = _conversion_error(error) or error
    if ran_out_of_memory(cause):
        # A device's memory is "out of memory"; the CPU's allocator "can't allocate memory".
        on_device = device.type != "cpu" and "out of memory" in str(cause).lower()
        kind = torch.OutOfMemoryError if on_device else MemoryError
        return kind(f"loading {source} onto {device}: {reason(cause)}")
    if is_device_failure(cause):
        return cause
    return ModelUnavailable(_reason("model", source, cause))


def _conversion_error(error: Exception) -> Exception | None:
    """Return what went wrong while tensors were joined or split, of which transformers only logs.

    Experts are stored one by one and joined on the device: memory that runs out there ends as "for
    details look at the above report", and the reason is in a variable of that frame.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name != _REPORTING:  # a frame that was looked into keeps what it held
            continue
        found = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if found:
            name, text = next(iter(found.items()))
            # A traceback, the error's message, and which tensors it is about.
            return RuntimeError(" ".join([f"{name}:", *text.strip().splitlines()[-2:]]))
    return None


def load_processor(source: str | Path) -> Any:
    """Load a model's processor; for a text model, its tokenizer.

    One without a chat template is given a plain one, see `plain_template`. Images are prepared by
    PIL, so that the pixels are the same whether or not torchvision is installed.

    Raises:
        ModelUnavailable: Nothing usable is there; the message says what is missing.
        MemoryError: This machine's memory is full, which is no fault of the model.
    """
    options = _options(source)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if _reads_images(config):
            processor = _load_image_processor(source, config, options)
        else:
            processor = AutoTokenizer.from_pretrained(source, **options)
    except (ModelUnavailable, MemoryError):
        raise
    except Exception as error:  # as above
        raise ModelUnavailable(_reason("processor of", source, error)) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if not getattr(processor, "chat_template", None):
        own = getattr(tokenizer, "chat_template", None)
        processor.chat_template = own or find_template(processor) or plain_template(processor)
    setattr(processor, CONFIG_IMAGE_IDS, _image_token_ids(config))
    return processor


def _load_image_processor(source: str | Path, config: Any, options: dict[str, Any]) -> Any:
    """Load the processor of a model that reads images.

    Raises:
        ModelUnavailable: No file of the model says how it reads images.
    """
    processor_class = find_processor_class(source, config, options)
    if processor_class is None:
        processor = AutoProcessor.from_pretrained(source, backend="pil", **options)
    elif has_unused_parts(processor_class):
        processor = assemble(processor_class, source, options)
    else:
        processor = processor_class.from_pretrained(source, backend="pil", **options)
    if getattr(processor, "tokenizer", None) is None or not hasattr(processor, "image_processor"):
        raise ModelUnavailable(
            f"The model {source} has no processor with a tokenizer and an image processor; add its"
            " preprocessor_config.json or processor_config.json, and the tokenizer's files."
        )
    return processor


@dataclass(frozen=True, kw_only=True)
class BaseOrigin:
    """Where a base model was loaded from, and what loads it there again."""

    source: str
    """A hub id, or the absolute path of a folder."""
    revision: str | None
    """The commit of a hub model."""
    auto_class: str
    """The name of the transformers class that loads it."""


def describe_origin(source: str | Path, model: nn.Module) -> BaseOrigin:
    """Say where a loaded base model came from.

    Args:
        source: What `load_base_model` was given.
        model: What it returned.
    """
    auto_class = str(_auto_model_for(model.config).__name__)
    if is_folder(source):
        folder = str(Path(source).expanduser().absolute())
        return BaseOrigin(source=folder, revision=None, auto_class=auto_class)
    # The cache that the model was just loaded from names its commit.
    config = cached_file(str(source), "config.json", local_files_only=True)
    revision = extract_commit_hash(config, None)
    return BaseOrigin(source=str(source), revision=revision, auto_class=auto_class)


@contextmanager
def known_warnings_ignored() -> Iterator[None]:
    """Be silent where PEFT 0.21 asks transformers 5.23 by a name that is on its way out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def is_folder(source: str | Path) -> bool:
    """Tell a local folder from a hub id: absolute and dotted paths are folders, there or not."""
    text = str(source)
    return Path(text).is_absolute() or text.startswith((".", "~")) or Path(text).is_dir()


def _reason(what: str, source: str | Path, error: Exception) -> str:
    """Say why loading failed: which packages are missing first, then transformers' own words."""
    folder = Path(source).expanduser() if is_folder(source) else None
    missing = explain_missing_packages(error, folder=folder)
    reason = f": {error}" if missing is None else f". {missing} ({error})"
    return f"The {what} {source} cannot be loaded{reason}"


def _options(source: str | Path) -> dict[str, Any]:
    """Return the loading options that hold for everything.

    Raises:
        ModelUnavailable: The source is a folder, and it lacks what a model folder needs.
    """
    options: dict[str, Any] = {"trust_remote_code": False}
    if not is_folder(source):
        return options
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ModelUnavailable(f"The model folder {folder} does not exist.")
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"The model folder {folder} has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise ModelUnavailable(
            f"The model folder {folder} has no *.safetensors file, the only weight format read"
            " here; save the model again with `save_pretrained`."
        )
    return {**options, "local_files_only": True}


def _auto_model_for(config: Any) -> Any:
    return AutoModelForImageTextToText if _reads_images(config) else AutoModelForCausalLM


def _image_token_ids(config: Any) -> tuple[int, ...]:
    """Return the ids at which a model puts image features, as its config declares them."""
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return tuple({each for each in ids if isinstance(each, int)})


def _reads_images(config: Any) -> bool:
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
