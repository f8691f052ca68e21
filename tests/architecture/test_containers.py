"""How the images and the composed services are locked down."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from store.settings import load_settings

ROOT = Path(__file__).parents[2]
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSED: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSED["services"]
OURS = {name: each for name, each in SERVICES.items() if "build" in each}
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_services_of_ours_are_known() -> None:
    assert {"api", "worker-cpu", "infer-cpu", "migrate"} <= OURS.keys()


@pytest.mark.parametrize("name", OURS)
def test_a_service_of_ours_writes_nowhere_but_to_volumes_and_has_no_privileges(name: str) -> None:
    service = OURS[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"]
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert service["ulimits"]["core"] == 0
    assert "privileged" not in service
    assert "user" not in service, "the image's own user has no rights; root would"
    for volume in service.get("volumes", []):
        assert "docker.sock" not in volume
        assert volume.endswith((":ro", ":/var/lib/grit")), volume


@pytest.mark.parametrize("name", SERVICES)
def test_only_the_front_door_is_published_and_on_loopback(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    if name == "api":
        assert ports
        assert all(str(port).startswith("127.0.0.1:") for port in ports)
    else:
        assert ports == []


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_on_a_network_that_was_chosen_for_it(name: str) -> None:
    networks = SERVICES[name]["networks"]
    assert set(networks) <= COMPOSED["networks"].keys()
    reaches_out = any(not (COMPOSED["networks"][each] or {}).get("internal") for each in networks)
    # The front door is published; workers may have to fetch models from a hub.
    assert reaches_out == (name == "api" or name.startswith(("worker", "infer")))


def test_secrets_are_files_and_in_no_variable_url_or_command() -> None:
    interpolated = set(re.findall(r"\$\{(\w+)", COMPOSE_TEXT))
    shares = {"TRAIN_DEVICE_MEMORY_SHARE", "INFER_DEVICE_MEMORY_SHARE"}
    assert interpolated == {"MEM_API", "MEM_WORKER", "MODELS", "SECRETS", *shares}
    for secret in COMPOSED["secrets"].values():
        assert secret.keys() == {"file"}
    for name, service in SERVICES.items():
        assert set(service.get("secrets", [])) <= COMPOSED["secrets"].keys(), name
        for key, value in (service.get("environment") or {}).items():
            assert "@" not in str(value) or ":" not in value.split("://")[1].split("@")[0], key
            if re.search(r"PASSWORD|SECRET", key):
                assert key.endswith("_FILE"), (name, key)
                assert value.removeprefix("/run/secrets/") in service["secrets"]


@pytest.mark.parametrize("name", OURS)
def test_a_service_of_ours_starts_with_the_settings_that_it_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = "a/#?@%:\" '$b"
    for secret in OURS[name]["secrets"]:
        (tmp_path / secret).write_text(f"{password}\n")
    monkeypatch.setenv("GRIT_SECRETS_FOLDER", str(tmp_path))
    for key, value in OURS[name]["environment"].items():
        monkeypatch.setenv(key, re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", value))  # its default
    settings = load_settings()
    assert make_url(settings.database_url).password == password
    assert settings.s3_secret_access_key is not None
    assert settings.s3_secret_access_key.get_secret_value() == password


def test_the_object_store_gets_its_secret_from_the_file_whatever_characters_it_has(
    tmp_path: Path,
) -> None:
    service = SERVICES["objects"]
    (secret,) = service["secrets"]
    password = "a/#?@%:\" '$HOME`id`\\b"
    (tmp_path / secret).write_text(password)
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nprintf "%s|" "$AWS_SECRET_ACCESS_KEY" "$@"\n')
    show.chmod(0o755)
    command = [
        each
        .replace("$$", "$")
        .replace("/run/secrets/", f"{tmp_path}/")
        .replace("/entrypoint.sh", str(show))
        for each in (*service["entrypoint"], *service["command"])
    ]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout.split("|")[:-1] == [password, *service["command"]]


@pytest.mark.parametrize("target", ["api", "worker"])
def test_an_image_runs_without_rights_and_cannot_change_its_own_files(target: str) -> None:
    stage = DOCKERFILE.split(f"AS {target}\n")[1].split("\nFROM ")[0]
    assert "\nUSER grit" in stage
    last_write = max(stage.rfind("\nCOPY"), stage.rfind("\nRUN"))
    assert stage.index("\nUSER grit") > last_write, "files are laid down by root"
    assert "--chown" not in stage
    assert "--require-hashes" in stage
    assert not re.search(r"^(ENV|ARG).*(PASSWORD|SECRET)", DOCKERFILE, re.MULTILINE)
