"""Put a processor together from its parts, without those that read videos and sounds.

Rows hold text and images only, the video parts of transformers need torchvision, and the audio
parts packages of their own. The parts for text and images are the family's, and images are always
prepared by PIL, so that pixels are the same with and without torchvision.
"""

import json
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils.hub import cached_file

UNUSED_PARTS: Final = frozenset({"video_processor", "feature_extractor", "audio_processor"})
"""Parts for videos and sounds, by their names in processors."""

_LOCK: Final = threading.Lock()
"""Held while a module stands in for another during an import."""

_NAMING_FILES: Final = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
"""Files that may name the class of a processor; the first that does decides, as in transformers."""


class UnusedPart(dict[str, Any]):
    """Stands where a processor keeps a part for videos or sounds.

    Settings that a processor reads from such a part are `None`; printed with the processor, it is
    an empty object.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def find_processor_class(source: str | Path, config: Any, options: dict[str, Any]) -> Any:
    """Return the processor class that a model's files or its config name; `None` without one.

    Args:
        source: A local folder or a hub id.
        config: The model's.
        options: For reading files.
    """
    for file in _NAMING_FILES:
        name = _read_json(source, file, options).get("processor_class")
        if isinstance(name, str):
            found = processor_class_from_name(name)
            if found is not None:
                return _with_pil_only(found)
    return _with_pil_only(PROCESSOR_MAPPING.get(type(config), None))


def has_unused_parts(processor_class: Any) -> bool:
    """Tell whether a processor has parts for videos or sounds."""
    return not UNUSED_PARTS.isdisjoint(processor_class.get_attributes())


def assemble(processor_class: Any, source: str | Path, options: dict[str, Any]) -> Any:
    """Load the parts of a processor that read text and images.

    Args:
        processor_class: One that has other parts, too.
        source: A local folder or a hub id.
        options: For reading files.
    """
    image_only = _without_unused_parts(processor_class)
    settings, unused = image_only.get_processor_dict(source, **options)
    parts = list(_parts(image_only, source, options))
    return image_only.from_args_and_dict(parts, settings, **_without(unused, options))


def _parts(processor_class: Any, source: str | Path, options: dict[str, Any]) -> Iterator[Any]:
    """Yield the parts in the order of the class's own arguments.

    Raises:
        ValueError: A part is of a kind that transformers loads otherwise.
    """
    for name in processor_class.get_attributes():
        if name in UNUSED_PARTS:
            yield UnusedPart()
        elif name == "image_processor":
            yield AutoImageProcessor.from_pretrained(source, backend="pil", **options)
        elif name == "tokenizer":
            yield AutoTokenizer.from_pretrained(source, **options)
        else:
            raise ValueError(f"its part {name!r} is of no kind that is read here")


def _without_unused_parts(processor_class: Any) -> Any:
    """Derive a class that takes `UnusedPart`, which transformers' check of types would refuse."""
    _need_no_number_words(processor_class)

    def check(self: Any, name: str, argument: Any) -> Any:
        if name in UNUSED_PARTS:
            return UnusedPart
        return processor_class.check_argument_for_proper_class(self, name, argument)

    members = {
        "__module__": processor_class.__module__,
        "check_argument_for_proper_class": check,
    }
    return type(processor_class.__name__, (processor_class,), members)


def _with_pil_only(processor_class: Any) -> Any:
    """Return a class that transformers withholds for its import of torchvision, where PIL will do.

    Pixtral's takes a function of sizes from its image processor's module, whose version for PIL
    has the same function.
    """
    if getattr(processor_class, "__name__", "") != "PixtralProcessor" or find_spec("torchvision"):
        return processor_class
    package = "transformers.models.pixtral"
    withheld = f"{package}.image_processing_pixtral"
    with _LOCK:
        sys.modules[withheld] = import_module(f"{package}.image_processing_pil_pixtral")
        try:
            return import_module(f"{package}.processing_pixtral").PixtralProcessor
        finally:
            del sys.modules[withheld]


def _need_no_number_words(processor_class: Any) -> None:
    """Let SmolVLM's processor exist without num2words, which only spells a video's frame count."""
    module = import_module(processor_class.__module__)
    if getattr(module, "num2words", ...) is None:
        module.num2words = str  # type: ignore[attr-defined]  # mypy follows no transformers


def _read_json(source: str | Path, file: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a file's values; none where there is no such file.

    Raises:
        ValueError: It is no JSON.
    """
    path = cached_file(
        str(source),
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        local_files_only=options.get("local_files_only", False),
    )
    if path is None:
        return {}
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its {file} is no JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _without(values: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
