"""The whole service in one go: start it, teach a small VLM a new task, and compare the answers.

Run by `make demo`. Every step is a call of the HTTP API, printed before it is made, so that you
could make it with curl. Ends with exit code 0 only if the adapter has learned the task.
"""

import argparse
import base64
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.columns import Columns
from rich.console import Console, Group
from rich.text import Text

from grit_client.client import GritClient
from grit_client.commands.plans import render_plan
from grit_client.commands.tables import facts, size, table
from grit_client.commands.watching import follow
from grit_client.errors import GritClientError
from grit_client.home import Home

EXAMPLES = Path(__file__).resolve().parent
MODEL = "digits-vlm"
LEAST_ACCURACY = 0.80
"""The adapter must reach this, ..."""
LEAST_GAIN = 0.30
"""... and be so far above the base model."""
TOGETHER = 4
"""Questions asked at the same time."""
SHADES = " .:-=+*#%@"
"""Where there are no colours: from black to white."""
SHOWN = 5


@dataclass(frozen=True)
class Question:
    """A held-out image, what is asked about it, and the right answer."""

    image: str
    prompt: str
    answer: str


class Narrated(httpx.HTTPTransport):
    """Prints each call before it is made; a call repeated many times is printed once."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._last = ""
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Say the method and path, then send the request."""
        call = f"{request.method} {request.url.path}"
        with self._lock:
            new = call != self._last
            self._last = call
        if new:
            self._console.print(f"    {call}", style="magenta", markup=False)
        return super().handle_request(request)


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=Path(".grit"), help="home of the service")
    parser.add_argument("--images", type=int, default=100, help="held-out images to ask about")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        return demo(console, Home.at(options.home), num_images=options.images)
    except (GritClientError, subprocess.CalledProcessError) as error:
        console.print(f"The demo failed: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted. The service may still be running; `make stop` ends it.")
        return 130


def demo(console: Console, home: Home, *, num_images: int) -> int:
    """All steps, in order."""
    began = time.monotonic()
    step(console, 1, "Start the service on this machine")
    start_service(console, home)
    with GritClient(home=home.folder, transport=Narrated(console)) as client:
        step(
            console, 2, "Register a base model that reads handwritten digits, and upload a dataset"
        )
        model = client.register_model(EXAMPLES / "digits-vlm", id=MODEL)
        console.print(
            f"    {MODEL}: {model.get('model_type')}, {model.get('total_parameters'):,} parameters"
        )
        dataset = client.upload_dataset(EXAMPLES / "digits" / "rotated-inverted-train.jsonl")
        console.print(
            f"    {dataset['id']}: {dataset.get('num_rows'):,} rows of digits turned by 90 degrees"
            f" and inverted, {size(dataset.get('size_bytes'))}"
        )

        step(console, 3, "Ask what the job would adapt, before anything runs")
        spec = json.loads((EXAMPLES / "jobs" / "digits.json").read_text(encoding="utf-8"))
        spec |= {"model": MODEL, "dataset": dataset["id"]}
        console.print(render_plan(client.plan(spec)))

        step(console, 4, "Fine-tune")
        job = client.create_job(spec)
        ended = follow(client, job["id"], console=console)
        if ended["status"] != "succeeded":
            console.print(f"Job {job['id']} {ended['status']}: {ended.get('error')}", markup=False)
            return 1
        console.print(loss_curve(client.metrics(job["id"], max_points=60)))

        step(console, 5, f"Ask about {num_images} held-out images, without and with the adapter")
        questions = read_questions(num_images)
        base = answers(client, questions, model=MODEL)
        tuned = answers(client, questions, job=job["id"])
        console.print(gallery(console, questions, base, tuned))
        passed = verdict(console, accuracy(questions, base), accuracy(questions, tuned))
        where_everything_lies(console, client, home, ended)
    console.print(f"\nThat took {time.monotonic() - began:.0f} s.")
    return 0 if passed else 1


def step(console: Console, number: int, title: str) -> None:
    """Print a step's title."""
    console.print(f"\n{number}. {title}", style="bold")


def start_service(console: Console, home: Home) -> None:
    """Run `grit up --detach`; a service that runs already is left alone."""
    console.print("    $ grit up --detach", style="magenta")
    grit = str(Path(sys.executable).with_name("grit"))
    subprocess.run([grit, "up", "--detach", "--home", str(home.folder)], check=True)  # noqa: S603 - our own program


def read_questions(num_images: int) -> list[Question]:
    """The first held-out rows."""
    path = EXAMPLES / "digits" / "rotated-inverted-heldout.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:num_images]
    questions = []
    for line in lines:
        user, assistant = json.loads(line)["messages"]
        parts = {part["type"]: part for part in user["content"]}
        questions.append(
            Question(
                image=parts["image_url"]["image_url"]["url"],
                prompt=parts["text"]["text"],
                answer=assistant["content"],
            )
        )
    return questions


def answers(client: GritClient, questions: list[Question], **target: str) -> list[str]:
    """The answers of one target, several questions at a time."""

    def ask(question: Question) -> str:
        answer = client.infer(question.prompt, images=[question.image], max_new_tokens=4, **target)
        return answer["output"].strip()

    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(ask, questions))


def accuracy(questions: list[Question], given: list[str]) -> float:
    """Share of the answers that are right."""
    right = sum(
        answer == question.answer for question, answer in zip(questions, given, strict=True)
    )
    return right / len(questions)


def verdict(console: Console, base: float, tuned: float) -> bool:
    """Print both accuracies side by side, and tell whether the task was learned."""
    rows = [["base model", f"{base:.1%}"], ["with the adapter", f"{tuned:.1%}"]]
    console.print(table(["", "right answers"], rows))
    passed = tuned >= LEAST_ACCURACY and tuned - base >= LEAST_GAIN
    rule = (
        f"at least {LEAST_ACCURACY:.0%} right, {LEAST_GAIN * 100:.0f} points above the base model"
    )
    console.print(
        f"{'Passed' if passed else 'FAILED'}: {rule}.", style="green" if passed else "bold red"
    )
    return passed


def where_everything_lies(console: Console, client: GritClient, home: Home, job: Any) -> None:
    """Say where the results are, and how to go on."""
    adapter = job["result"]["adapter"]
    console.print("\nWhere everything lies", style="bold")
    console.print(
        facts({
            "service": client.base_url,
            "key": str(home.key_file),
            "database, objects": str(home.folder),
            "logs": str(home.logs),
            "job": f"{job['id']}  (.venv/bin/grit job {job['id']})",
            "adapter": f"{adapter}  (.venv/bin/grit adapters download {adapter})",
            "go on": "the service is still running; `make stop` ends it, `make serve` starts it",
        })
    )


def loss_curve(metrics: dict[str, Any]) -> Text:
    """The training loss over the steps, as a line of blocks."""
    losses = [loss for loss in metrics["series"].get("train_loss", []) if loss is not None]
    if not losses:
        return Text("")
    low, high = min(losses), max(losses)
    spread = (high - low) or 1.0
    blocks = "".join(chr(0x2581 + round((loss - low) / spread * 7)) for loss in losses)
    return Text(f"    loss {losses[0]:.3f} {blocks} {losses[-1]:.3f}", style="cyan")


def gallery(
    console: Console, questions: list[Question], base: list[str], tuned: list[str]
) -> Columns:
    """A few images with both answers; first those that the base model gets wrong."""
    order = sorted(range(len(questions)), key=lambda index: base[index] == questions[index].answer)
    cards = []
    for index in order[:SHOWN]:
        question = questions[index]
        caption = Text.assemble(
            f"is {question.answer}\n",
            ("base ", "dim"),
            answered(base[index], question.answer),
            ("\ntuned ", "dim"),
            answered(tuned[index], question.answer),
        )
        cards.append(Group(picture(console, question.image), caption))
    return Columns(cards, padding=(1, 4))


def answered(given: str, right: str) -> Text:
    """An answer, green when it is right."""
    return Text(given[:12] or "(nothing)", style="green" if given == right else "red")


def picture(console: Console, url: str, *, side: int = 16) -> Text:
    """An image as half-block characters, two pixels each; without colours, as shades."""
    data = base64.b64decode(url.partition(",")[2])
    with Image.open(BytesIO(data)) as image:
        pixels = image.convert("L").resize((side, side), Image.Resampling.BOX).tobytes()
    text = Text()
    for top in range(0, side, 2):
        for column in range(side):
            upper, lower = pixels[top * side + column], pixels[(top + 1) * side + column]
            if console.color_system is None:
                text.append(SHADES[(upper + lower) * len(SHADES) // 512])
            else:
                style = f"rgb({upper},{upper},{upper}) on rgb({lower},{lower},{lower})"
                text.append("\N{UPPER HALF BLOCK}", style=style)
        text.append("\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
