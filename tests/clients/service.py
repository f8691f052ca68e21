"""The embedded service that all clients talk to, with one model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grit_client.client import GritClient
from grit_client.home import Home
from grit_core.images import decode_data_url

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = "digits-vlm"
QUESTION = "Which digit is this?"
GRIT = Path(sys.executable).with_name("grit")
NUM_ROWS = 12


@dataclass(frozen=True)
class Target:
    """What the drivers read from their environment."""

    url: str
    key: str
    image: Path
    answer: str
    rows: Path

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a driver."""
        return {
            "CLIENT_URL": f"{self.url}/v1",
            "CLIENT_KEY": self.key,
            "CLIENT_MODEL": MODEL,
            "CLIENT_IMAGE": str(self.image),
            "CLIENT_ANSWER": self.answer,
            "CLIENT_ROWS": str(self.rows),
        }


@contextmanager
def running_service(folder: Path) -> Iterator[Target]:
    """Run a service with its home in a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    home = Home.at(folder / "home")
    where = ["--home", str(home.folder)]
    subprocess.run([GRIT, "up", "--detach", *where], check=True, stdout=subprocess.DEVNULL)
    try:
        yield _prepare(home, folder.resolve())
    finally:
        subprocess.run([GRIT, "down", *where], check=True, stdout=subprocess.DEVNULL)


def _prepare(home: Home, folder: Path) -> Target:
    lines = (EXAMPLES / "digits" / "upright-heldout.jsonl").read_text().splitlines()
    url = json.loads(lines[0])["messages"][0]["content"][0]["image_url"]["url"]
    image, rows = folder / "digit.png", folder / "rows.jsonl"
    image.write_bytes(decode_data_url(url))
    rows.write_text("\n".join(lines[:NUM_ROWS]) + "\n")
    with GritClient(home=home.folder) as client:
        client.register_model(EXAMPLES / MODEL, id=MODEL)
        answer = client.infer(QUESTION, model=MODEL, images=[url])["output"]
    return Target(
        url=home.url_file.read_text().strip(),
        key=home.read_key() or "",
        image=image,
        answer=answer,
        rows=rows,
    )
