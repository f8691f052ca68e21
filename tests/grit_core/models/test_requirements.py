"""Packages that a model needs and that are not installed are named with their installation.

A module that is `None` in `sys.modules` is not installed, for Python and for transformers. Each
test has a process of its own, because transformers remembers what it has found.
"""

import json
import subprocess
import sys
from pathlib import Path

from grit_core.models.requirements import missing_packages
from tests.tiny_models import tiny_causal_folder

ROOT = Path(__file__).parents[3]

PROBE = """
import sys
for name in sys.argv[2:]:
    sys.modules[name] = None
from grit_core.errors import ModelUnavailable
from grit_core.models.probe import probe_model
try:
    probe_model(sys.argv[1])
except ModelUnavailable as error:
    print(error)
"""

CONSTRUCT = """
import sys, types
for name in sys.argv[2:]:
    sys.modules[name] = None
import transformers
from grit_core.models.requirements import missing_packages
for expression in sys.argv[1].split("; "):
    try:
        eval(expression)
    except ImportError as error:
        print(*missing_packages("some/model", error))
"""


def run_without(script: str, argument: str, *modules: str) -> str:
    """Run a script in a process in which these modules are not installed."""
    command = [sys.executable, "-W", "ignore", "-c", script, argument, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


TOKENIZER = "types.SimpleNamespace(convert_tokens_to_ids=len)"


def test_a_sentencepiece_tokenizer_without_its_packages_names_them(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0b\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    file = folder / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizer"}
    file.write_text(json.dumps(settings))
    message = run_without(PROBE, str(folder), "sentencepiece", "google.protobuf")
    assert "it needs protobuf and sentencepiece" in message
    assert "pip install protobuf sentencepiece" in message
    assert "tiktoken" not in message.partition("pip install")[0]


def test_a_class_of_transformers_without_its_package_names_it() -> None:
    needs = {
        f"transformers.SmolVLMProcessor(None, {TOKENIZER}, None)": "num2words",
        "transformers.Qwen2VLVideoProcessor()": "torchvision",
        "transformers.TimmBackbone(None)": "timm",
    }
    named = run_without(CONSTRUCT, "; ".join(needs), *needs.values())
    assert named.splitlines() == list(needs.values())


def test_a_module_that_is_not_there_is_named_by_its_distribution() -> None:
    error = ValueError("the tokenizer cannot be read")
    error.__cause__ = ModuleNotFoundError("no module", name="google.protobuf")
    assert missing_packages("some/model", error) == ["protobuf"]


def test_other_errors_name_no_package() -> None:
    assert missing_packages("some/model", ValueError("pip install something")) == []
