"""`docs/families.md`: the families that are tried, what each takes, needs and refuses."""

from collections.abc import Iterable
from pathlib import Path

from grit_core.config.families import FAMILIES, Family, family_of
from tests.families.case import FamilyCase

FILE = Path(__file__).parents[2] / "docs" / "families.md"

INTRODUCTION = """\
# Families of models

`make families` builds a small random model of every type below, as a folder from a user: config,
safetensors, tokenizer, processor, chat template. It then registers the folder, plans with the
family's defaults, checks the labels, trains three steps on rows with one image, with two, with none
and mixed, compares the adapter with plain PEFT, compares answers with `generate` of transformers
token by token, and answers for two adapters and the base model in one batch. `make test` does the
quicker half of it. This file is written by `make families`; do not edit it.

"""


NEEDS = """
## What a folder needs

- `config.json`, weights as `*.safetensors`, and the tokenizer's files. A model that reads images
  also needs `preprocessor_config.json` or `processor_config.json`.
- A chat template: `chat_template.jinja`, `chat_template.json`, or in `tokenizer_config.json`.
  A text model without one is trained on lines of `User:` and `Assistant:`.
- `tokenizer.json`. Where only `tokenizer.model` is there, the package `sentencepiece` must be
  installed.

Rows hold text and images. The video and audio parts of a processor are never loaded, so a family
that also reads videos needs neither `torchvision` nor `num2words` for its images. Images are
prepared by PIL where transformers has a PIL version of the family's image processor, with and
without `torchvision`. The few families without one need `torchvision`; no `torchvision` fits a CPU
build of torch 2.13. A package that is missing is named when the model is registered.
"""


def write() -> str:
    """Render the whole file."""
    from tests.families.cases import CASES  # noqa: PLC0415 - cases load torch

    supported = [case for case in CASES if case.refused is None]
    refused = [case for case in CASES if case.refused is not None]
    parts = [
        INTRODUCTION,
        "## Vision-language models\n\n",
        _table(case for case in supported if case.reads_images),
        "\n## Text models\n\n",
        _table(case for case in supported if not case.reads_images),
    ]
    if refused:
        parts += ["\n## Refused at registration\n\n", _refusals(refused)]
    parts.append(NEEDS)
    return "".join(parts)


def _table(cases: Iterable[FamilyCase]) -> str:
    lines = [
        "| Family | Model type | Images of a chat | Traits | Adapted by default | Needs |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {_title(case)} | `{case.model_type}`{_variant(case)} | {_images(case)}"
        f" | {_traits(case)} | {_parts(case)} | {_needs(case)} |"
        for case in sorted(cases, key=_order)
    ]
    return "\n".join(line.replace("  ", " ") for line in lines) + "\n"


def _refusals(cases: Iterable[FamilyCase]) -> str:
    lines = ["| Model type | Why |", "|---|---|"]
    lines += [
        f"| `{case.model_type}`{_variant(case)} | {case.needs} |"
        for case in sorted(cases, key=lambda case: case.name)
    ]
    return "\n".join(lines) + "\n"


def _order(case: FamilyCase) -> tuple[int, str]:
    names = list(FAMILIES)
    family = family_of(case.model_type)
    return (names.index(family.name) if family else len(names), case.name)


def _title(case: FamilyCase) -> str:
    family = family_of(case.model_type)
    return family.title if family else case.model_type


def _variant(case: FamilyCase) -> str:
    return f" ({case.variant.replace('_', ' ')})" if case.variant else ""


def _images(case: FamilyCase) -> str:
    if not case.reads_images:
        return "none"
    least = 1 if case.needs_images else 0
    return f"{least} or more" if case.max_images is None else f"{least} to {case.max_images}"


def _needs(case: FamilyCase) -> str:
    return ", ".join(need for need in (case.package, case.needs) if need)


def _traits(case: FamilyCase) -> str:
    return ", ".join(sorted(trait.replace("_", " ") for trait in case.traits))


def _parts(case: FamilyCase) -> str:
    family: Family | None = family_of(case.model_type)
    if family is None:  # text models of any type adapt the usual names of their attention
        return "" if case.reads_images else "text"
    names = [modality.value.replace("_", " ") for modality in family.queries]
    return ", ".join(names)
