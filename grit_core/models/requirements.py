"""Name the packages that a model's files need and that are not installed."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

_DISTRIBUTIONS: Final = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "google": "protobuf",
    "google.protobuf": "protobuf",
    "sklearn": "scikit-learn",
    "vision": "pillow",
    "mistral_common": "mistral-common",
}
"""Distributions whose name is not that of their module."""

_PIP_INSTALL: Final = re.compile(r"pip install (?:-U |--upgrade )?[`'\"]?([A-Za-z0-9][\w.-]*)")
_SENTENCEPIECE_FILES: Final = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
)


def missing_packages(source: str | Path, error: BaseException | None) -> list[str]:
    """Return the distributions without which a model could not be read, sorted.

    Args:
        source: A local folder or a hub id; only a folder's file names are looked at.
        error: What transformers raised; its causes are followed.
    """
    needed = _sentencepiece_packages(source)
    if needed:
        return needed
    found: set[str] = set()
    for cause in _causes(error):
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            found.add(_distribution(cause.name))
        elif isinstance(cause, ImportError):
            found |= _missing_backends(cause)
    return sorted(found)


def _missing_backends(error: ImportError) -> set[str]:
    """Return what transformers' own table of optional packages says of its own message."""
    from transformers.utils.import_utils import BACKENDS_MAPPING

    text = str(error)
    found = set()
    for name, (is_available, message) in BACKENDS_MAPPING.items():
        # The message begins with the name of the class that asks.
        fixed = message.partition("{0}")[2].strip().splitlines()
        if fixed and fixed[0].strip() in text and not is_available():
            found.add(_distribution(name))
    return found or {name for name in _PIP_INSTALL.findall(text) if name != "transformers"}


def _sentencepiece_packages(source: str | Path) -> list[str]:
    """Return what a folder needs whose tokenizer is a SentencePiece model and nothing else.

    Transformers mentions these packages only in its log, and raises that tiktoken is missing.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / "tokenizer.json").is_file():
        return []
    if not any((folder / name).is_file() for name in _SENTENCEPIECE_FILES):
        return []
    needed = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    return sorted(package for module, package in needed.items() if not _is_installed(module))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should hold it
        return False


def _distribution(module: str) -> str:
    top = module.partition(".")[0]
    return _DISTRIBUTIONS.get(module, _DISTRIBUTIONS.get(top, top))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
