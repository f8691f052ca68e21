"""Adapters of strangers: what is taken, what of it is kept, and how all else is refused."""

import gzip
import io
import itertools
import json
import pickle
import random
import shutil
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from safetensors.numpy import load, save
from starlette.testclient import TestClient

from api.services import Services
from store import base_models
from store.database import transaction
from tests.api.conftest import MODEL, Team, app_settings, new_team, opened, tiny_inventory
from tests.api.test_datasets import refused, tarred, zipped

if TYPE_CHECKING:
    from fastapi import FastAPI

TEXT_LAYER = "model.text_model.layers.0.self_attn.q_proj"
VISION_LAYER = "model.vision_model.encoder.layers.1.self_attn.v_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Tensors = dict[str, Any]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def client(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One app for all; each test has a team of its own."""
    folder = tmp_path_factory.mktemp("imports")
    shutil.copy(sqlite_template, folder / "grit.db")
    with (
        opened(app_settings(folder / "home", f"sqlite:///{folder}/grit.db")) as app,
        TestClient(app, raise_server_exceptions=False) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def services(client: TestClient) -> Services:
    found: Services = cast("FastAPI", client.app).state.services
    return found


@pytest.fixture
def team(client: TestClient) -> Team:
    return new_team(client, f"team-{next(_numbers)}")


def stored(services: Services) -> set[str]:
    return {entry.key for entry in services.objects.list("adapters/")}


def key(layer: str, side: str) -> str:
    return f"base_model.model.{layer}.lora_{side}.weight"


def tensors() -> Tensors:
    source = np.random.default_rng(0)
    sizes = {TEXT_LAYER: 128, VISION_LAYER: 96}
    return {
        key(layer, side): source.normal(size=(3, size) if side == "A" else (size, 3)).astype("f4")
        for layer, size in sizes.items()
        for side in "AB"
    }


def config(**changes: Any) -> bytes:
    written = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": "Idefics3ForConditionalGeneration",
            "parent_library": "transformers.models.idefics3.modeling_idefics3",
        },
        "base_model_name_or_path": "/home/somebody/models/tiny",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "revision": "a secret",
    }
    return json.dumps(written | changes).encode()


def folder(**files: bytes | None) -> dict[str, bytes]:
    """The files of an adapter; `config` and `weights` change theirs, none leaves one out."""
    given = {CONFIG: config(), WEIGHTS: save(tensors(), metadata={"format": "pt"})}
    names = {"config": CONFIG, "weights": WEIGHTS}
    given |= {names.get(name, name): data for name, data in files.items()}  # type: ignore[misc] # filtered next
    return {name: data for name, data in given.items() if data is not None}


def send(team: Team, *files: tuple[str, bytes], **fields: str) -> Any:
    parts = [("file", file) for file in files]
    return team.post("/adapters", files=parts, data={"model": MODEL, **fields})


def send_folder(team: Team, **files: bytes | None) -> Any:
    return send(team, *folder(**files).items())


@pytest.mark.parametrize(
    "packed",
    [
        lambda files: list(files.items()),
        lambda files: [("adapter.zip", zipped(files))],
        lambda files: [
            ("adapter.zip", zipped({f"my/{name}": data for name, data in files.items()}))
        ],
        lambda files: [("adapter.tar", tarred(files))],
        lambda files: [
            ("a", tarred({f"./x/{name}": data for name, data in files.items()}, mode="w:gz"))
        ],
        lambda files: [("adapter.tar.xz", tarred(files, mode="w:xz"))],
    ],
    ids=["files", "zip", "folder in a zip", "tar", "folder in a tar.gz", "tar.xz"],
)
def test_an_adapter_that_peft_saved_is_stored_under_settings_of_our_own(
    team: Team, services: Services, packed: Callable[..., Any]
) -> None:
    files = folder(**{"README.md": b"# mine", "grit.json": b"{}"})
    answer = send(team, *packed(files), name="mine")
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert answer.headers["Location"] == f"/adapters/{made['id']}"
    assert (made["origin"], made["name"], made["model"]) == ("import", "mine", MODEL)
    assert made["trainable_parameters"] == 3 * (256 + 192)
    assert made["ranks"] == {TEXT_LAYER: 3, VISION_LAYER: 3}
    assert team.get(f"/adapters/{made['id']}").json() == made
    with tarfile.open(
        fileobj=io.BytesIO(team.get(f"/adapters/{made['id']}/download").content)
    ) as archive:
        kept = {
            member.name.rpartition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
        }
    assert set(kept) == {CONFIG, WEIGHTS}
    assert kept[WEIGHTS] == files[WEIGHTS]
    settings = json.loads(kept[CONFIG])
    assert settings["base_model_name_or_path"] == "/models/tiny"
    architecture = tiny_inventory().architecture
    assert settings["auto_mapping"]["base_model_class"] == architecture
    assert settings["target_modules"] == sorted([TEXT_LAYER, VISION_LAYER])
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)
    assert b"secret" not in kept[CONFIG]
    mine = {name for name in stored(services) if made["id"] in name}
    assert len(mine) == 3  # the manifest is the third


def test_the_same_content_is_imported_once_within_a_team(
    team: Team, client: TestClient, services: Services
) -> None:
    before = stored(services)
    made = send_folder(team).json()
    shuffled = save(dict(reversed(tensors().items())), metadata={"other": "words"})
    again = send(team, ("a.zip", zipped(folder(weights=shuffled, config=config(revision="2")))))
    assert (again.status_code, again.json()["id"]) == (200, made["id"])
    assert again.headers["Location"] == f"/adapters/{made['id']}"
    named = send(team, *folder().items(), name="another name")
    other = send_folder(new_team(client, "beta"))
    scaled = send_folder(team, config=config(lora_alpha=7))
    found = {answer.json()["id"] for answer in (named, other, scaled)}
    assert [answer.status_code for answer in (named, other, scaled)] == [201] * 3
    assert len(found | {made["id"]}) == 4
    assert len(team.get("/adapters").json()["data"]) == 3
    assert len({name.split("/")[1] for name in stored(services) - before}) == 4


def nan(layer: str = TEXT_LAYER) -> Tensors:
    changed = tensors()
    changed[key(layer, "B")][5, 1] = np.nan
    return changed


def raw(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 4], "data_offsets": [start, end]}


def without(name: str) -> Tensors:
    return {each: value for each, value in tensors().items() if each != name}


B62 = {
    "header beyond its bound": struct.pack("<Q", 5 * 1024**2) + bytes(6 * 1024**2 // 4),
    "header beyond the file": struct.pack("<Q", 1 << 63) + b"{}",
    "overlap": raw({key("a", "A"): entry(0, 32), key("a", "B"): entry(16, 48)}),
    "out of range": raw({key("a", "A"): entry(0, 32), key("a", "B"): entry(64, 96)}),
    "gap": raw({key("a", "A"): entry(0, 32), key("a", "B"): entry(40, 72)}, bytes(72)),
    "negative": raw({key("a", "A"): entry(-32, 0), key("a", "B"): entry(0, 32)}, bytes(32)),
    "name that comes twice": raw(b'{"a":{},"a":{}}'),
    "name that is no text": raw({key("\ud800", "A"): entry(0, 32), "b": entry(32, 64)}),
    "cut off": save(tensors())[:-1],
    "bytes left over": save(tensors()) + b"\0",
    "no tensors": save({}),
    "dtype": save({name: value.astype("f8") for name, value in tensors().items()}),
    "integers": save({name: value.astype("i4") for name, value in tensors().items()}),
    "unknown key": save(tensors() | {"lm_head.weight": np.zeros((2, 2), "f4")}),
    "half a pair": save(without(key(TEXT_LAYER, "B"))),
    "shape of A": save(tensors() | {key(TEXT_LAYER, "A"): np.zeros((2, 128), "f4")}),
    "no matrix": save(tensors() | {key(TEXT_LAYER, "A"): np.zeros((3, 128, 1), "f4")}),
    "not a number": save(nan()),
    "a pickle": pickle.dumps({"state": 1}),
    "empty": b"",
}


@pytest.mark.parametrize("weights", B62.values(), ids=B62)
def test_weights_that_are_no_finite_pairs_of_matrices_are_refused(
    team: Team, services: Services, weights: bytes
) -> None:
    before = stored(services)
    refused(send_folder(team, weights=weights), 422, "adapter_invalid")
    assert stored(services) == before
    assert team.get("/adapters").json()["data"] == []


def test_a_rank_beyond_what_is_served_and_a_missing_file_are_named(team: Team) -> None:
    large = {key(TEXT_LAYER, "A"): np.zeros((257, 128), "f4")}
    large |= {key(TEXT_LAYER, "B"): np.zeros((128, 257), "f4")}
    answer = send_folder(team, weights=save(large), config=config(r=257))
    assert "at most 256" in refused(answer, 422, "adapter_invalid")["detail"]
    for name in ("config", "weights"):
        answer = send_folder(team, **{name: None})
        missing = {"config": CONFIG, "weights": WEIGHTS}[name]
        assert missing in refused(answer, 422, "adapter_invalid")["detail"]


B63 = {
    "no JSON": b"{",
    "no object": b"[]",
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe",
    "a key twice": b'{"peft_type": "LORA", "peft_type": "LORA"}',
    "too long": config(revision="x" * 1024**2),
    "auto_mapping": config(auto_mapping={"base_model_class": "x", "parent_library": "os"}),
    "modules_to_save": config(modules_to_save=["lm_head"]),
    "huge r": config(r=10**9),
    "endless r": config(r=10**4000),
    "infinite alpha": config(lora_alpha=float("inf")),
    "r of other weights": config(r=4),
    "peft_type": config(peft_type="IA3"),
    "dora": config(use_dora=True),
    "bias": config(bias="lora_only"),
    "embedding rows": config(trainable_token_indices=[1]),
    "base model changed": config(init_lora_weights="pissa"),
    "bomb among the ranks": config(rank_pattern={"(a+)+$": 3}),
    "bomb among the alphas": config(alpha_pattern={"(a|a)*b": 3}),
}


@pytest.mark.parametrize("written", B63.values(), ids=B63)
def test_settings_that_are_more_than_plain_lora_are_refused(team: Team, written: bytes) -> None:
    problem = refused(send_folder(team, config=written), 422, "adapter_config_invalid")
    assert len(problem["detail"]) < 500


def test_a_regex_of_target_modules_is_never_run(team: Team) -> None:
    """Which layers are adapted is read off the tensors alone."""
    started = time.monotonic()
    answer = send_folder(team, config=config(target_modules="(.*.*.*.*.*.*.*.*)+#"))
    assert answer.status_code == 201, answer.text
    assert time.monotonic() - started < 2


def test_an_adapter_of_another_base_model_names_the_layer(team: Team) -> None:
    other = {name.replace("text_model", "language_model"): v for name, v in tensors().items()}
    problem = refused(send_folder(team, weights=save(other)), 422, "adapter_mismatch")
    assert "model.language_model.layers.0.self_attn.q_proj" in problem["detail"]
    wide = tensors() | {key(TEXT_LAYER, "A"): np.zeros((3, 64), "f4")}
    problem = refused(send_folder(team, weights=save(wide)), 422, "adapter_mismatch")
    assert "128 inputs" in problem["detail"]
    assert "64" in problem["detail"]


def linked() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(WEIGHTS)
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    return buffer.getvalue()


B61 = {
    "bin": ([("adapter_model.bin", b"\x80\x04")], 415, "format_not_allowed"),
    "bin beside": ([(CONFIG, config()), ("adapter_model.bin", b"")], 415, "format_not_allowed"),
    "pt in a zip": ([("a.zip", zipped(folder(**{"x.pt": b""})))], 415, "format_not_allowed"),
    "torch's zip": ([("a", zipped({"archive/data.pkl": b""}))], 415, "format_not_allowed"),
    "code": ([("a.zip", zipped(folder(**{"modeling.py": b""})))], 415, "format_not_allowed"),
    "7z": ([("a.7z", b"7z\xbc\xaf\x27\x1c")], 415, "format_not_allowed"),
    "gzip of no tar": ([("a.gz", gzip.compress(b"words"))], 415, "format_not_allowed"),
    "empty": ([("a.zip", b"")], 415, "format_not_allowed"),
    "link": ([("a.tar", linked())], 422, "archive_unsafe_member"),
    "path": ([("a.zip", zipped({f"../{CONFIG}": b""}))], 422, "archive_unsafe_member"),
    "archive within": ([("a.zip", zipped({"b.zip": b""}))], 422, "archive_limits"),
    "bomb": ([("a.zip", zipped({WEIGHTS: bytes(20_000_000)}))], 422, "archive_limits"),
    "gzip bomb": ([("a.gz", gzip.compress(bytes(20_000_000)))], 422, "archive_limits"),
    "broken zip": ([("a.zip", zipped(folder())[:-40])], 422, "adapter_invalid"),
    "broken tar.gz": ([("a", tarred(folder(), mode="w:gz")[:-40])], 422, "adapter_invalid"),
    "two folders": (
        [("a.zip", zipped({f"a/{CONFIG}": config(), f"b/{WEIGHTS}": b""}))],
        422,
        "adapter_invalid",
    ),
    "empty zip": ([("a.zip", zipped({}))], 422, "adapter_invalid"),
    "twice": ([(CONFIG, config()), (CONFIG, config())], 422, "adapter_invalid"),
    "name": ([("../a.zip", b"")], 422, "filename_invalid"),
    "too many": ([(f"{n}.json", b"") for n in range(5)], 400, "upload_incomplete"),
    "too large": ([("a.zip", bytes(2_100_000))], 413, "upload_too_large"),
}


@pytest.mark.parametrize(("files", "status", "code"), B61.values(), ids=B61)
def test_other_files_than_an_adapters_are_refused(
    team: Team, services: Services, files: list[tuple[str, bytes]], status: int, code: str
) -> None:
    before = stored(services)
    refused(send(team, *files), status, code)
    assert stored(services) == before


@pytest.mark.parametrize(
    ("fields", "code", "pointer"),
    [
        ({"model": ""}, "field_missing", "/model"),
        ({"model": "unknown"}, "model_not_found", "/model"),
        ({"origin": "job"}, "field_unknown", "/origin"),
        ({"name": "x" * 201}, "string_invalid", "/name"),
        ({"file": "words"}, "field_missing", "/file"),
    ],
)
def test_the_form_is_checked_field_by_field(
    team: Team, fields: dict[str, str], code: str, pointer: str
) -> None:
    problem = refused(send(team, *folder().items(), **fields), 422, code)
    assert pointer in {fault["pointer"] for fault in problem["errors"]}


def test_a_model_whose_layers_are_not_known_yet_says_when_to_come_again(
    team: Team, services: Services
) -> None:
    with transaction(services.engine) as session:
        base_models.register(session, id="new", source="allowed/new")
    answer = send(team, *folder().items(), model="new")
    refused(answer, 409, "model_not_ready")
    assert answer.headers["Retry-After"]


def test_an_imported_adapter_is_handed_to_vllm_as_any_other(team: Team) -> None:
    text = {name: value for name, value in tensors().items() if TEXT_LAYER in name}
    made = send_folder(team, weights=save(text)).json()["id"]
    answer = team.get(f"/adapters/{made}/download?layout=vllm")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        file = archive.extractfile(f"{made}/{WEIGHTS}")
        assert file is not None
        padded = load(file.read())
    name = key(TEXT_LAYER, "B")
    np.testing.assert_allclose(padded[name][:, :3], text[name] * 2, rtol=1e-6)


def test_damage_anywhere_is_refused_in_words_or_leaves_an_adapter(team: Team) -> None:
    """Files and archives with bytes changed, cut off and repeated: no 5xx, and no wait."""
    source = random.Random(0)  # noqa: S311 - seeded on purpose
    small = {key(TEXT_LAYER, "A"): np.ones((3, 128), "f4")}
    small |= {key(TEXT_LAYER, "B"): np.ones((128, 3), "f4")}
    whole = folder(weights=save(small))
    plain = zipped(whole, compression=zipfile.ZIP_STORED)
    archives = [zipped(whole), plain, tarred(whole), tarred(whole, mode="w:gz")]
    statuses = []
    for _ in range(40):  # tests/fuzz has the many, without a process for each
        files = dict(whole)
        if source.random() < 0.5:
            name = source.choice(sorted(files))
            files[name] = damaged(files[name], source)
            sent = list(files.items())
        else:
            sent = [("archive", damaged(source.choice(archives), source))]
        started = time.monotonic()
        answer = send(team, *sent)
        assert time.monotonic() - started < 2
        assert answer.status_code in {200, 201, 415, 422}, answer.text
        statuses.append(answer.status_code)
    assert statuses.count(422) > 10
    assert statuses.count(201) > 0


def damaged(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(source.randint(1, 3)):
        # Half of the places in the headers, which come first or last.
        edge = source.choice([0, max(0, len(changed) - 400)])
        place = source.choice([source.randrange(len(changed)), edge + source.randrange(400)])
        place = min(place, len(changed) - 1)
        kind = source.randrange(4)
        if kind == 0:
            changed[place] = source.randrange(256)
        elif kind == 1:
            changed[place] ^= 1 << source.randrange(8)
        elif kind == 2:
            del changed[place : place + source.randint(1, 60)]
        else:
            changed[place:place] = changed[place : place + source.randint(1, 60)]
    return bytes(changed)
