"""An environment for each client: what its lock names, in a folder below `build/clients`."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = Path("build/clients")
UV = Path(sys.executable).with_name("uv")


@dataclass(frozen=True)
class Client:
    """One row of the matrix."""

    name: str
    package: str
    """Its version is the row's."""
    driver: Path
    lock: str = ""
    """Of a client from PyPI; npm has one lock for all."""

    @property
    def from_npm(self) -> bool:
        """Whether it runs under Node."""
        return self.driver.suffix == ".mjs"


CLIENTS = (
    Client("openai 3 (Python)", "openai", HERE / "python/openai_client.py", "openai3"),
    Client("openai 2 (Python)", "openai", HERE / "python/openai_client.py", "openai2"),
    Client("openai (npm)", "openai", HERE / "npm/openai.mjs"),
    Client("litellm", "litellm", HERE / "python/litellm_client.py", "litellm"),
    Client(
        "langchain-openai", "langchain-openai", HERE / "python/langchain_client.py", "langchain"
    ),
    Client("instructor", "instructor", HERE / "python/instructor_client.py", "instructor"),
    Client(
        "llama-index",
        "llama-index-llms-openai-like",
        HERE / "python/llama_index_client.py",
        "llama_index",
    ),
    Client("AI SDK (npm)", "ai", HERE / "npm/ai-sdk.mjs"),
)


def prepare(client: Client) -> list[str]:
    """Install a client as its lock says and return the command that runs its driver.

    Raises:
        FileNotFoundError: If Node is missing.
    """
    if not client.from_npm:
        return [str(_install_python(client)), str(client.driver)]
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is missing: install Node 20 or later (apt install nodejs npm)")
    folder = BUILD / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "npm").iterdir():
        shutil.copy(file, folder)
    subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True)
    return ["node", str((folder / client.driver.name).resolve())]


def version(client: Client) -> str:
    """Return the installed version of a client's package."""
    if client.from_npm:
        script = f"console.log(require('./node_modules/{client.package}/package.json').version)"
        command, folder = ["node", "-e", script], BUILD / "npm"
    else:
        script = f"import importlib.metadata as m; print(m.version({client.package!r}))"
        command, folder = [str(_install_python(client)), "-c", script], None
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _install_python(client: Client) -> Path:
    folder = (BUILD / client.lock).resolve()
    python, lock = folder / "bin/python", HERE / f"locks/{client.lock}.txt"
    if not (folder / ".ready").exists() or (folder / ".ready").read_text() != lock.read_text():
        subprocess.run([UV, "venv", "--quiet", "--clear", str(folder)], check=True)
        install = [UV, "pip", "sync", "--quiet", "--require-hashes", "--python", str(python)]
        subprocess.run([*install, str(lock)], check=True)
        (folder / ".ready").write_text(lock.read_text())
    return python
