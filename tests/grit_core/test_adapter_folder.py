"""An adapter folder that is looked through before anything is loaded from it."""

import json
import random
import shutil
import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from grit_core.adapter_folder import check_against, read_adapter_folder
from grit_core.artifacts import write_adapter
from grit_core.errors import AdapterConfigInvalid, AdapterInvalid, AdapterMismatch
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model
from grit_core.models.vlm_adapter import lora_layers
from tests.tiny_models import tiny_causal_folder, tiny_vlm_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LAYER = "model.text_model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_vlm_folder(tmp_path_factory.mktemp("models")))


def peft_model(base, **options):
    torch.manual_seed(0)
    return get_peft_model(
        load_base_model(base),
        LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "fc1"], **options}),
    )


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    write_adapter(path, peft_model(base), base_model_name="tiny")
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "adapter")


def read(folder, **bounds):
    return read_adapter_folder(folder, **{"max_rank": 64, "max_bytes": 1 << 20, **bounds})


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {LAYER: 7, "fc1": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 9}},
        {"target_modules": r".*text_model.*\.(up|down)_proj"},
    ],
)
def test_ranks_and_scales_are_those_that_peft_gives_the_layers(base, tmp_path, options):
    model = peft_model(base, **options)
    write_adapter(tmp_path / "adapter", model, base_model_name="tiny")
    found = read(tmp_path / "adapter").layers
    expected = {
        name: (layer.r["default"], layer.scaling["default"], layer.in_features, layer.out_features)
        for name, layer in lora_layers(model).items()
    }
    assert {
        name: (layer.rank, layer.scale, layer.in_features, layer.out_features)
        for name, layer in found.items()
    } == expected


def test_an_adapter_fits_the_model_it_was_made_for_and_no_other(base, folder, tmp_path):
    header = read(folder)
    check_against(header, build_inventory(base))
    other = build_inventory(str(tiny_causal_folder(tmp_path)))
    with pytest.raises(AdapterMismatch, match="has no linear layer"):
        check_against(header, other)


def test_what_peft_itself_saves_is_read(base, tmp_path):
    """With `auto_mapping`, which it writes for models without a task."""
    model = peft_model(base)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["parent_library"].startswith("transformers.")
    assert set(read(tmp_path / "adapter").layers) == set(lora_layers(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "x" * 1000}, r"x\.\.\.; LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"auto_mapping": {"parent_library": "transformersx"}}, "auto_mapping"),
        ({"auto_mapping": {"parent_library": "transformers.models", "x": "y"}}, "auto_mapping"),
        ({"auto_mapping": ["os"]}, "auto_mapping"),
        ({"r": True}, "r True"),
        ({"r": 10**400}, "r 1000"),
        ({"lora_alpha": 1e10}, "at most 1e"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"rank_pattern": {"q_proj": float("nan")}}, "nan"),
        ({"rank_pattern": {f"layer_{n}": 4 for n in range(10_001)}}, "at most 10000"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"auto_mapping": {"base_model_class": "os.system"}}, "auto_mapping"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"rank_pattern": {"(a+)+$": 3}}, "without wildcards"),
        ({"alpha_pattern": {"q_proj": -1}}, "above 0"),
        ({"rank_pattern": [1]}, "no object"),
        ({"r": 0}, "r 0"),
        ({"r": "many"}, "number above 0"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 5}, "gives .* rank 5"),
    ],
)
def test_settings_that_are_more_than_plain_lora_are_refused_by_name(copy, changes, message):
    change_config(copy, **changes)
    with pytest.raises(AdapterConfigInvalid, match=message):
        read(copy)


def first(tensors, side="A"):
    return next(name for name in tensors if f"lora_{side}" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {first(t): t[first(t)] * torch.inf}, "not finite"),
        (lambda t: t | {first(t): t[first(t)].bfloat16() * torch.nan}, "lora_A.* not finite"),
        (lambda t: t | {first(t): t[first(t)].double()}, "F64"),
        (lambda t: t | {first(t): t[first(t)].long()}, "I64"),
        (lambda t: t | {first(t): t[first(t)][0]}, "matrices alone"),
        (lambda t: t | {first(t): t[first(t)][:3]}, "3 rows"),
        (lambda t: t | {"lm_head.weight": torch.zeros(2, 2)}, "lm_head.weight"),
        (lambda t: {n: v for n, v in t.items() if n != first(t)}, "not both"),
    ],
)
def test_tensors_that_are_no_pair_of_finite_matrices_are_refused(copy, change, message):
    change_tensors(copy, change)
    with pytest.raises(AdapterInvalid, match=message):
        read(copy)


def test_ranks_and_files_beyond_the_bounds_are_refused_with_their_numbers(folder):
    with pytest.raises(AdapterInvalid, match=r"rank 4 .* at most 3"):
        read(folder, max_rank=3)
    with pytest.raises(AdapterInvalid, match="at most 100 are allowed"):
        read(folder, max_bytes=100)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    (copy / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(AdapterInvalid, match=name):
        read(copy)


def test_settings_in_which_a_key_comes_twice_are_refused(copy):
    path = copy / "adapter_config.json"
    path.write_bytes(path.read_bytes().rstrip()[:-1] + b', "r": 64}')
    with pytest.raises(AdapterConfigInvalid, match="twice"):
        read(copy)


def test_patterns_times_layers_are_bounded(copy, monkeypatch):
    monkeypatch.setattr("grit_core.adapter_settings.MAX_LOOKUPS", 11)
    change_config(copy, rank_pattern={r"o\.ne": 4, r"t\.wo": 4, "th.ree": 4})
    assert read(copy).layers
    change_config(copy, alpha_pattern={"o.ne": 4, "t.wo": 4})
    with pytest.raises(AdapterConfigInvalid, match="at most 1 are read"):
        read(copy)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"text"', b"[" * 100_000, b"\xff\xfe"])
def test_settings_that_are_no_json_object_are_refused(copy, raw):
    (copy / "adapter_config.json").write_bytes(raw)
    with pytest.raises(AdapterInvalid, match="adapter_config"):
        read(copy)


def weights_with(header, data=b"\0" * 64):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def pair(a, b):
    prefix = "base_model.model.layer"
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def entry(start, end, shape=(2, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 1 << 60) + b"{}",
        weights_with(b"{" * 1000),
        weights_with([]),
        weights_with({}),
        weights_with(pair(entry(0, 32), entry(16, 48))),  # overlapping
        weights_with(pair(entry(0, 32), entry(40, 72))),  # beyond the end, with a gap
        weights_with(pair(entry(0, 32), entry(32, 60))),  # another size than its shape
        weights_with(pair(entry(0, 32), entry(32, 64)), b"\0" * 65),  # bytes left over
        weights_with(pair(entry(-32, 0), entry(0, 32))),
        weights_with(pair(entry(0, 32, shape=(2.0, 4)), entry(32, 64))),
        weights_with(pair(entry(0, 32, shape=(-2, -4)), entry(32, 64))),
        weights_with(pair(entry(0, 32, dtype="U8"), entry(32, 64))),
        weights_with(pair(None, entry(32, 64))),
        weights_with({"base_model.model.\ud800.lora_A.weight": entry(0, 64, shape=(4, 4))}),
        weights_with(b'{"__metadata__": {}, "__metadata__": {}}'),
    ],
)
def test_files_that_are_no_whole_safetensors_file_are_refused(copy, raw):
    (copy / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors"):
        read(copy)


def test_damage_anywhere_is_refused_or_leaves_plain_matrices(copy):
    """Bytes changed, cut off and repeated: never another error than `AdapterInvalid`."""
    source = random.Random(0)  # noqa: S311 - seeded on purpose
    originals = {path.name: path.read_bytes() for path in copy.iterdir()}
    refused = 0
    for _ in range(400):
        name = source.choice(["adapter_config.json", "adapter_model.safetensors"])
        raw = bytearray(originals[name])
        for _ in range(source.randint(1, 4)):
            place = source.randrange(min(len(raw), 6000))
            kind = source.randrange(3)
            if kind == 0:
                raw[place] = source.randrange(256)
            elif kind == 1:
                del raw[place : place + source.randint(1, 50)]
            else:
                raw[place:place] = raw[place : place + source.randint(1, 50)]
        (copy / name).write_bytes(raw)
        try:
            read(copy)
        except AdapterInvalid:
            refused += 1
        (copy / name).write_bytes(originals[name])
    assert refused > 200
    assert read(copy).layers
