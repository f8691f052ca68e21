"""Every block of docs/configuration.md and of the guide that users were promised, executed."""

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from api.schemas.adapters import AdapterCompress
from grit_core import GRITLoRAConfig, get_model_config
from grit_core.compression_job import COMPRESSION_CHECKS
from grit_core.config import (
    LayerSelectionStrategy,
    Modality,
    ModalityConfig,
    ModelGRITConfig,
    TrainingConfig,
    describe_preset,
    preset_names,
)
from grit_core.config.bounds import Choice, Number
from grit_core.config.devices import PRIORITY
from grit_core.config.families import FAMILIES
from grit_core.config.model_configs import MODALITY_CHECKS, MODEL_CHECKS
from grit_core.config.presets import resolve_config
from grit_core.config.training import TRAINING_CHECKS, training_from_dict
from grit_core.models.vlm_adapter import VLMGRITAdapter
from grit_core.plan import plan_adaptation
from tests.architectures import small_smolvlm_config, smolvlm_256m, smolvlm_256m_config

# PEFT asks transformers 5 by a name that transformers calls deprecated: between the two of them.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

HUB_ID = "HuggingFaceTB/SmolVLM-256M-Instruct"
ROOT = Path(__file__).parents[2]
OURS = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
ORIGINAL = (Path(__file__).parent / "original-guide.md").read_text(encoding="utf-8")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    output: str | None
    """Of the `text` block that stands directly below."""


def blocks_of(page: str) -> list[Block]:
    found = list(_FENCE.finditer(page))
    blocks = []
    for match, below in zip(found, [*found[1:], None], strict=True):
        adjoins = below is not None and below[1] == "text" and below.start() == match.end() + 1
        blocks.append(
            Block(
                language=match[1],
                text=match[2],
                line=page.count("\n", 0, match.start()) + 2,
                output=below[2] if adjoins and below is not None else None,
            )
        )
    return blocks


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "python"]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with SmolVLM-256M's layer names, in place of the hub's."""
    folder = tmp_path_factory.mktemp("small-smolvlm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(small_smolvlm_config())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def true_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolVLM-256M's true config and no weights: all that an inventory takes."""
    folder = tmp_path_factory.mktemp("true-smolvlm")
    smolvlm_256m_config().save_pretrained(folder)
    return folder


class FreshModel(dict[str, Any]):
    """Names of a block, in which each mention of a `model` that it did not make is a new one.

    The guide's first block builds two adapters from one `model`; they are alternatives.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self._base = base

    def __missing__(self, name: str) -> Any:
        if name == "model":
            return copy.deepcopy(self._base)
        raise KeyError(name)


def run(
    block: Block,
    *,
    text: str,
    page: str,
    namespace: dict[str, Any],
    own: FreshModel | None = None,
) -> str:
    """Execute a block and return what it printed; a traceback shows the page's own line."""
    shifted = "\n" * (block.line - 1) + text
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = compile(shifted, page, "exec", dont_inherit=True)
        exec(code, namespace, namespace if own is None else own)  # noqa: S102 - our own pages
    return printed.getvalue()


@pytest.mark.slow
def test_every_python_block_of_our_page_runs_and_prints_what_it_says(
    small_folder: Path, true_folder: Path
) -> None:
    namespace: dict[str, Any] = {"__name__": "configuration"}
    blocks = python_blocks(OURS)
    for block in blocks:
        folder = true_folder if "build_inventory(" in block.text else small_folder
        text = block.text.replace(HUB_ID, str(folder))
        printed = run(block, text=text, page="docs/configuration.md", namespace=namespace)
        assert printed == (block.output or ""), f"docs/configuration.md:{block.line}"
    assert sum(block.output is not None for block in blocks) >= 10


def test_every_json_block_of_our_page_is_a_job_that_can_be_planned() -> None:
    blocks = [block for block in blocks_of(OURS) if block.language == "json"]
    assert blocks
    for block in blocks:
        job = json.loads(block.text)
        config = resolve_config(job.get("config"), preset=job.get("preset"))
        named = {m: job[f"{m}_layers"] for m in Modality if f"{m}_layers" in job}
        assert plan_adaptation(config, smolvlm_256m(), overrides=named).warnings == ()
        training_from_dict(job.get("training", {}))


def test_no_block_of_our_page_is_of_a_kind_that_nothing_checks() -> None:
    below = [block.output for block in blocks_of(OURS) if block.output is not None]
    for block in blocks_of(OURS):
        assert block.language in {"python", "json", "text"}
        assert block.language != "text" or block.text in below


def rows_under(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its two head lines left out."""
    section = OURS.split(f"\n{heading}\n", maxsplit=1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]
    ]


@pytest.mark.parametrize(
    ("heading", "config", "checks"),
    [
        ("### `ModelGRITConfig`", ModelGRITConfig, MODEL_CHECKS),
        ("### `ModalityConfig`", ModalityConfig, MODALITY_CHECKS),
        ("### `training`", TrainingConfig, TRAINING_CHECKS),
    ],
    ids=["model", "modality", "training"],
)
def test_a_table_of_fields_states_every_default_and_bound(
    heading: str, config: Any, checks: dict[str, Any]
) -> None:
    stated = {row[0].strip("`"): row[1:] for row in rows_under(heading)}
    assert list(stated) == [field.name for field in dataclasses.fields(config)]
    for name, (default, words) in stated.items():
        assert json.loads(default.strip("`")) == getattr(config(), name), name
        check = checks.get(name)
        if isinstance(check, Number):
            assert words.startswith(check.expected), name
        elif isinstance(check, Choice):
            assert words.startswith(", ".join(check.values)), name


def test_the_table_of_a_compression_states_every_default_and_bound() -> None:
    stated = {row[0].strip("`"): row[1:] for row in rows_under("### Compress a finished adapter")}
    assert list(stated) == list(AdapterCompress.model_fields)
    for name, (default, words) in stated.items():
        assert json.loads(default.strip("`")) == AdapterCompress.model_fields[name].default, name
        if name in COMPRESSION_CHECKS:
            assert words.startswith(COMPRESSION_CHECKS[name].expected), name


def summary(part: dict[str, Any] | None) -> str:
    if part is None:
        return ""
    number = part["n_layers"] or part["step_size"]
    return part["strategy"] if number is None else f"{part['strategy']} {number}"


def test_the_table_of_presets_is_complete_and_true() -> None:
    rows = rows_under("### The presets")
    assert sorted(row[0].strip("`") for row in rows) == sorted(preset_names())
    for name, family, vision, text, cross_modal in rows:
        preset = describe_preset(name.strip("`"))
        config = preset["config"]
        assert family.strip("`") == preset["family"]
        parts = [summary(config[key]) for key in ("vision", "text", "cross_modal")]
        assert parts == [vision, text, cross_modal]
        assert (config["fusion"] is not None) == ("mllama" in name)


def test_the_table_of_families_is_complete_and_true() -> None:
    rows = rows_under("### Patterns")
    assert [row[0].strip("`") for row in rows] == list(FAMILIES)
    for name, model_types, parts in rows:
        family = FAMILIES[name.strip("`")]
        assert model_types == ", ".join(f"`{each}`" for each in family.model_types)
        assert parts == ", ".join(m for m in Modality if family.default_patterns(m))


def test_the_tables_of_strategies_are_complete_and_true() -> None:
    strategies = [row[0].strip("`") for row in rows_under("### Strategies")]
    assert strategies == list(LayerSelectionStrategy)
    devices = {row[0].strip("`"): row[1] for row in rows_under("## Devices")}
    assert devices == {strategy: ", ".join(order) for strategy, order in PRIORITY.items()}


@pytest.mark.slow
def test_every_python_block_of_the_original_guide_runs_with_our_package(
    small_folder: Path,
) -> None:
    base = transformers.AutoModelForImageTextToText.from_pretrained(small_folder)

    def load_model(**kwargs: Any) -> Any:
        """The guide's reader's own function."""
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        return transformers.AutoModelForImageTextToText.from_pretrained(small_folder, **kwargs)

    namespace: dict[str, Any] = {
        "__name__": "guide",
        "torch": torch,
        "nn": nn,
        "load_model": load_model,
        "Idefics3ForConditionalGeneration": transformers.Idefics3ForConditionalGeneration,
        "LayerSelectionStrategy": LayerSelectionStrategy,
        "config": get_model_config("smolvlm_fast"),
    }
    for block in python_blocks(ORIGINAL):
        text = block.text.replace("grit_vlm", "grit_core").replace(HUB_ID, str(small_folder))
        if "@dataclass" in text:
            run(block, text=text, page="original-guide.md", namespace=signature_namespace())
            continue
        own = FreshModel(base)
        run(block, text=text, page="original-guide.md", namespace=namespace, own=own)
        namespace |= {name: value for name, value in own.items() if name != "model"}


def signature_namespace() -> dict[str, Any]:
    """What the guide's two listings of fields take for granted."""
    names: dict[str, Any] = {name: getattr(typing, name) for name in ("List", "Optional")}
    names |= {"dataclass": dataclasses.dataclass, "field": dataclasses.field}
    names |= {"ModalityConfig": ModalityConfig, "LayerSelectionStrategy": LayerSelectionStrategy}
    return {**names, "__name__": "listing"}


@pytest.mark.parametrize("ours", [ModelGRITConfig, ModalityConfig])
def test_the_listings_of_the_guide_are_our_fields_and_defaults(ours: Any) -> None:
    (block,) = (
        block for block in python_blocks(ORIGINAL) if f"class {ours.__name__}:" in block.text
    )
    namespace = signature_namespace()
    run(block, text=block.text, page="original-guide.md", namespace=namespace)
    listed = namespace[ours.__name__]
    fields = {field.name: field for field in dataclasses.fields(listed)}
    own = [field.name for field in dataclasses.fields(ours)]
    assert [name for name in own if name in fields] == list(fields)
    hints, our_hints = typing.get_type_hints(listed), typing.get_type_hints(ours)
    for name, field in fields.items():
        assert plain(hints[name]) == plain(our_hints[name]), name
        if field.default is not dataclasses.MISSING:
            assert field.default == getattr(ours(), name), name
        elif field.default_factory is not dataclasses.MISSING:
            assert field.default_factory() == getattr(ours(), name), name
        else:
            assert name in {"model_name", "model_type"}


def plain(hint: Any) -> str:
    """A type without the difference between `List[int]` and `list[int]`."""
    text = hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)
    optional = re.fullmatch(r"typing\.Optional\[(.*)\]", text)
    text = f"{optional[1]} | None" if optional else text
    return text.replace("typing.List", "list").rpartition(".")[2]


@pytest.mark.parametrize(
    ("preset", "vision", "text", "cross_modal"),
    [("smolvlm_fast", 3, 4, 1), ("smolvlm_256m", 12, 8, 1)],
)
def test_the_adapter_has_the_layers_that_the_guide_s_table_promises(
    small_folder: Path, preset: str, vision: int, text: int, cross_modal: int
) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(small_folder)
    adapter = VLMGRITAdapter(model=model, config=GRITLoRAConfig(), model_config_name=preset)
    counts = [len(adapter.plan.of(modality)) for modality in Modality]
    assert counts == [vision, text, cross_modal, 0]
    wrapped = [name for name, _ in adapter.model.named_modules() if name.endswith(".lora_A")]
    assert len(wrapped) == vision + text + cross_modal
