"""Name the Python packages that a model's files need and this environment lacks."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

PACKAGES: Final = {
    "torchvision": "torchvision",
    "num2words": "num2words",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "protobuf": "google.protobuf",
    "mistral-common": "mistral_common",
    "timm": "timm",
    "einops": "einops",
    "scipy": "scipy",
    "opencv-python": "cv2",
    "av": "av",
    "librosa": "librosa",
    "ftfy": "ftfy",
    "jinja2": "jinja2",
    "flash-attn": "flash_attn",
    "mamba-ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
    "kernels": "kernels",
    "detectron2": "detectron2",
    "pytesseract": "pytesseract",
}
"""What families of transformers ask for: the package to install, and the module that it brings."""

SENTENCEPIECE: Final = "sentencepiece"
_FIRST_FIELD: Final = b"\n"
"""The tag of a SentencePiece model's vocabulary; a tiktoken file begins with base64."""

_LEARN_MORE: Final = {
    "torchvision": "torchvision must fit the installed torch, and none fits a CPU build of torch"
    " 2.13",
}


def explain_missing_packages(error: BaseException, *, folder: Path | None = None) -> str | None:
    """Return a sentence about the packages that an error is about; `None` when there is none.

    Args:
        error: Raised by transformers; everything that it was raised from is read as well, because
            the last message often names a fallback only.
        folder: Of the model, where its files are local: a SentencePiece vocabulary without its
            package fails as a file of another kind.
    """
    missing = find_missing_packages(error)
    if folder is not None and _has_sentencepiece_only(folder) and not _is_installed(SENTENCEPIECE):
        missing = (SENTENCEPIECE,)
    if not missing:
        return None
    several = len(missing) > 1
    sentence = (
        f"It needs the Python package{'s' if several else ''} {' or '.join(missing)}, which"
        f" {'are' if several else 'is'} not installed here: pip install {missing[0]}."
    )
    more = [_LEARN_MORE[name] for name in missing if name in _LEARN_MORE]
    return " ".join([sentence, *(f"Note that {each}." for each in more)])


def find_missing_packages(error: BaseException) -> tuple[str, ...]:
    """Return the packages that an error's messages name and that cannot be imported here."""
    # The first cause comes last in the chain and is what the fallbacks after it stood in for.
    texts = [_text(each) for each in reversed(list(_chain(error)))]
    found = [
        package
        for text in texts
        for package, module in PACKAGES.items()
        if _names(text, package, module) and not _is_installed(module)
    ]
    return tuple(dict.fromkeys(found))


def _has_sentencepiece_only(folder: Path) -> bool:
    """Tell whether a folder's tokenizer is a SentencePiece model, and not also a tokenizer.json."""
    if (folder / "tokenizer.json").exists():
        return False
    for path in folder.glob("*.model"):
        with path.open("rb") as file:
            if file.read(1) == _FIRST_FIELD:
                return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += (each.__cause__, each.__context__)


def _text(error: BaseException) -> str:
    name = error.name if isinstance(error, ImportError) else None
    return f"{error} {name or ''}"


def _names(text: str, package: str, module: str) -> bool:
    words = {re.escape(package), re.escape(module), re.escape(package.replace("-", "_"))}
    return re.search(rf"(?<![\w.-])(?:{'|'.join(words)})(?![\w-])", text, re.IGNORECASE) is not None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
