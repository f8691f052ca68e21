"""The settings of an adapter folder: read, and refused where they mean more than plain LoRA."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Final

from grit_core.errors import AdapterConfigInvalid

CONFIG: Final = "adapter_config.json"
MAX_CONFIG_BYTES: Final = 1024**2
MAX_PATTERNS: Final = 10_000


PLAIN_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "megatron_config": (),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    # The others change the base model's weights when PEFT loads the adapter.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Settings that a plain LoRA adapter leaves out, empty or at one of these values."""

MAX_LOOKUPS: Final = 1_000_000
"""Layers times patterns with bare dots: more than a model has, and still seconds at most."""
_LITERAL: Final = re.compile(r"\^?(?:[\w.-]|\\[.\-])+", re.ASCII)
"""Patterns of ranks and alphas are names, escaped or not: no repetition, nothing to run away."""
_BARE_DOT: Final = re.compile(r"(?<!\\)\.")
_AUTO_MAPPING: Final = {
    "base_model_class": re.compile(r"[A-Za-z_]\w{0,127}", re.ASCII),
    "parent_library": re.compile(r"transformers(\.\w{1,64}){0,8}", re.ASCII),
}
_MAX_NUMBER: Final = 1e9


def auto_mapping(architecture: str) -> dict[str, Any]:
    """Return the settings by which PEFT's `AutoPeftModel` classes find the base model's class.

    A `task_type` would serve one of these classes and have `AutoPeftModel` itself refuse the
    adapter; with the class named, all of them load it.

    Args:
        architecture: The class of transformers that the base model is of.
    """
    return {
        "task_type": None,
        "auto_mapping": {"base_model_class": architecture, "parent_library": "transformers"},
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings.

    Raises:
        AdapterConfigInvalid: They are not those of a plain LoRA adapter.
    """
    path = folder / CONFIG
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterConfigInvalid(f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes.")
    try:
        config = parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterConfigInvalid(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterConfigInvalid(f"{CONFIG} is no JSON object.")
    if config.get("peft_type") != "LORA":
        raise AdapterConfigInvalid(
            f"{CONFIG} has peft_type {shown(config.get('peft_type'))}; LORA adapters alone are"
            " read."
        )
    for name, allowed in PLAIN_VALUES.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            raise AdapterConfigInvalid(
                f"{CONFIG} has {name} {shown(value)}; plain LoRA alone is read, which leaves it"
                " out."
            )
    _check_auto_mapping(config.get("auto_mapping"))
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, config.get(name))
    for name in ("r", "lora_alpha"):
        if not _is_number(config.get(name)) or not config[name] > 0:
            raise AdapterConfigInvalid(
                f"{CONFIG} has {name} {shown(config.get(name))}; it is a number above 0 and at"
                f" most {_MAX_NUMBER:g}."
            )
    return config


def _check_auto_mapping(mapping: object) -> None:
    """Take what PEFT writes for models of transformers without a task, which nobody follows here.

    Raises:
        AdapterConfigInvalid: It names code of another package.
    """
    if not mapping:
        return
    names = list(mapping.items()) if isinstance(mapping, dict) else []
    if not names or not all(
        isinstance(value, str) and key in _AUTO_MAPPING and _AUTO_MAPPING[key].fullmatch(value)
        for key, value in names
    ):
        raise AdapterConfigInvalid(
            f"{CONFIG} has auto_mapping {shown(mapping)}; a class of transformers alone may stand"
            " there, or nothing. Leave it out."
        )


def _check_pattern(name: str, patterns: object) -> None:
    """Look at the ranks or alphas of single layers.

    Raises:
        AdapterConfigInvalid: They are no numbers, or their names are more than names.
    """
    if patterns is None:
        return
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise AdapterConfigInvalid(
            f"{CONFIG} has a {name} that is no object of at most {MAX_PATTERNS}."
        )
    for key, value in patterns.items():
        if not _LITERAL.fullmatch(key):
            raise AdapterConfigInvalid(
                f"{CONFIG} has the {name} key {shown(key)}; layer names alone are read, without"
                " wildcards."
            )
        if not _is_number(value) or not value > 0:
            raise AdapterConfigInvalid(f"{CONFIG} has {name}[{key}] {shown(value)}; it is above 0.")


class ByLayer:
    r"""The values of single layers, as PEFT looks them up: by the first key that a name ends with.

    PEFT searches for `(.*\.)?(key)$`, which takes minutes for keys that were made for it. A key
    stands for names of one length, so its place in a name is known before anything is compared.
    """

    def __init__(self, patterns: Mapping[str, float] | None, common: float) -> None:
        """Take `patterns` that have been checked, and the value of all other layers."""
        self._common = common
        self._whole: dict[str, tuple[int, float]] = {}
        self._endings: dict[str, tuple[int, float]] = {}
        self._loose: list[tuple[int, float, _LooseKey]] = []
        for place, (key, value) in enumerate((patterns or {}).items()):
            anchored = key.startswith("^")
            parts = [part.replace("\\", "") for part in _BARE_DOT.split(key.removeprefix("^"))]
            if len(parts) > 1:
                self._loose.append((place, value, _LooseKey(parts, anchored=anchored)))
            else:
                exact = self._whole if anchored else self._endings
                exact.setdefault(parts[0], (place, value))

    def __call__(self, name: str) -> float:
        """Return a layer's value."""
        endings = [name, *(name[dot + 1 :] for dot, sign in enumerate(name) if sign == ".")]
        found = [self._endings[ending] for ending in endings if ending in self._endings]
        if name in self._whole:
            found.append(self._whole[name])
        loose = ((place, value) for place, value, key in self._loose if key.fits(name))
        found.extend(islice(loose, 1))
        return min(found)[1] if found else self._common

    def refuse_long_lookup(self, name: str, *, num_layers: int) -> None:
        """Bound the time that all layers take.

        Raises:
            AdapterConfigInvalid: There are too many patterns for so many layers.
        """
        if len(self._loose) * num_layers > MAX_LOOKUPS:
            raise AdapterConfigInvalid(
                f"{CONFIG} has {len(self._loose)} patterns with bare dots in {name} for"
                f" {num_layers} layers; at most {MAX_LOOKUPS // num_layers} are read. Write dots as"
                r" \. and name each layer once."
            )


class _LooseKey:
    """A key with bare dots, each of which stands for any one character."""

    def __init__(self, parts: Sequence[str], *, anchored: bool) -> None:
        """Take what is between the dots."""
        ends = list(accumulate(len(part) + 1 for part in parts))
        self._length = ends[-1] - 1
        starts = [end - 1 - len(part) for end, part in zip(ends, parts, strict=True)]
        self._parts = [pair for pair in zip(starts, parts, strict=True) if pair[1]]
        self._anchored = anchored

    def fits(self, name: str) -> bool:
        """Tell whether a name is of this kind, or ends so after a dot."""
        start = len(name) - self._length
        if start < 0 or (start > 0 and (self._anchored or name[start - 1] != ".")):
            return False
        return all(name.startswith(part, start + offset) for offset, part in self._parts)


def parse_json(raw: bytes) -> Any:
    """Read JSON in which no key comes twice: readers differ in which of them counts."""
    return json.loads(raw, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON.

    Raises:
        ValueError: A key comes twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= _MAX_NUMBER  # which infinity and NaN are not


def shown(value: object) -> str:
    """Write a value for a message, and no more than the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
