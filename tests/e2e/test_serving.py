"""The real service answers: streams, fair turns, callers who leave, workers that die or stop."""

import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import torch
from peft import LoraConfig, get_peft_model

from grit_core.artifacts import write_adapter
from grit_core.models.pretrained import load_base_model
from store import adapters, base_models, workers
from store.database import transaction
from store.ids import new_id
from store.keys import Scope, create_key
from store.models import AdapterOrigin, ModelStatus
from tests.e2e.deployment import Broker, Deployment, WorkerProcess, deployed
from tests.ports import reserve_port
from tests.tiny_models import tiny_vlm_folder
from worker.device_loss import EXIT_DEVICE_LOST

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

QUICK, SLOW = "tests/quick", "tests/slow"
"""About 1 ms a token, and about 10."""
LOST_SECONDS = 3
PLACES = 5
"""Of a worker whose batch holds two requests."""


class Service:
    """A deployment with an API and one inference worker, both processes of their own."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.settings = deployment.settings
        port = reserve_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "api", "--port", str(port), "--drain-seconds", "1"]
        log = self.settings.home / "api.log"
        self.api = WorkerProcess(command, deployment.environment, log)
        deployment.workers.append(self.api)
        self.broker = redis.Redis.from_url(self.settings.broker_url)
        self.worker = self.start_worker()

    def start_worker(self, **environment: str) -> WorkerProcess:
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "infer.cpu"]
        name = f"infer-{len(self.deployment.workers)}"
        command += ["--pool=threads", "-c", str(PLACES + 1), "-n", f"{name}@%h"]
        command += ["--without-gossip", "--without-mingle"]
        log = self.settings.home / f"{name}.log"
        self.worker = WorkerProcess(command, {**self.deployment.environment, **environment}, log)
        self.deployment.workers.append(self.worker)
        return self.worker

    def register(self, name: str, folder: Path) -> None:
        with transaction(self.deployment.engine) as session:
            base_models.register(session, id=name, source=str(folder))

    def wait_ready(self, name: str) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.worker.running, self.worker.text()[-3000:]
            with transaction(self.deployment.engine, read_only=True) as session:
                if base_models.get(session, name).status == ModelStatus.READY:
                    return
            time.sleep(0.1)
        raise TimeoutError(self.worker.text()[-3000:])

    def add_adapter(self, folder: Path) -> str:
        """Store an adapter of the quick model for team alpha; return its id."""
        adapter_id = new_id("adp")
        prefix = f"adapters/{adapter_id}"
        manifest = self.deployment.objects.put_folder(prefix, folder)
        with transaction(self.deployment.engine) as session:
            adapters.create_adapter(
                session,
                id=adapter_id,
                team="alpha",
                origin=AdapterOrigin.IMPORT,
                model=QUICK,
                prefix=prefix,
                size_bytes=manifest.size_bytes,
                details={"manifest_sha256": manifest.sha256},
            )
        return adapter_id

    def running(self) -> int:
        """How many requests a worker says that it is answering."""
        return len(self.broker.keys(f"{self.settings.queue_prefix}infer:running:*"))

    def wait_running(self, count: int, *, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while self.running() != count:
            assert time.monotonic() < deadline, f"{self.running()} run and not {count}"
            time.sleep(0.01)


class Caller:
    """A team and its connection."""

    def __init__(self, service: Service, team: str) -> None:
        with transaction(service.deployment.engine) as session:
            _, token = create_key(
                session, team=team, name="test", scopes={Scope.INFER, Scope.WRITE}
            )
        headers = {"Authorization": f"Bearer {token}"}
        limits = httpx.Limits(max_connections=100)
        self.http = httpx.Client(base_url=service.url, headers=headers, timeout=60, limits=limits)

    def ask(
        self, prompt: str = "Hello?", *, model: str | None = QUICK, **fields: Any
    ) -> httpx.Response:
        named = {} if model is None else {"model": model}
        return self.http.post("/infer", json={**named, "prompt": prompt, **fields})

    def events(
        self,
        prompt: str = "Hello?",
        *,
        model: str = QUICK,
        on_event: Callable[[str, Any], object] = lambda _kind, _data: None,
        **fields: Any,
    ) -> list[tuple[str, Any]]:
        """The events of a stream, up to its end or to a true word of `on_event`."""
        body = {"model": model, "prompt": prompt, "stream": True, **fields}
        found: list[tuple[str, Any]] = []
        with self.http.stream("POST", "/infer", json=body) as response:
            assert response.status_code == 200, response.read()
            kind = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    found.append((kind, json.loads(line.removeprefix("data: "))))
                    if on_event(*found[-1]):
                        break
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    home = tmp_path_factory.mktemp("home")
    settings = {
        "infer_max_batch": "2",
        "infer_lost_seconds": str(LOST_SECONDS),
        "infer_timeout_seconds": "40",
    }
    with deployed(home=home, broker_url=broker.url, **settings) as deployment:
        made = Service(deployment)
        models = tmp_path_factory.mktemp("models")
        made.register(QUICK, tiny_vlm_folder(models))
        made.register(SLOW, tiny_vlm_folder(models, text_layers=24))
        made.wait_ready(QUICK)
        made.wait_ready(SLOW)
        yield made
        made.broker.close()
    broker.stop()


@pytest.fixture
def call(service: Service) -> Iterator[Callable[[str], Caller]]:
    made: list[Caller] = []

    def caller(team: str = "alpha") -> Caller:
        made.append(Caller(service, team))
        return made[-1]

    yield caller
    for one in made:
        one.http.close()
    service.wait_running(0)


def test_a_stream_says_piece_by_piece_what_an_answer_says_at_once(
    call: Callable[..., Caller],
) -> None:
    alpha = call()
    whole = alpha.ask(model=SLOW, max_new_tokens=100)
    assert whole.status_code == 200, whole.text
    heard_at: list[float] = []
    found = alpha.events(
        model=SLOW, max_new_tokens=100, on_event=lambda *_: heard_at.append(time.monotonic())
    )
    *pieces, (last, answer) = found
    assert {kind for kind, _ in pieces} == {"delta"}
    assert last == "done"
    assert "".join(data["text"] for _, data in pieces) == answer["output"]
    assert answer["output"] == whole.json()["output"]
    assert answer["usage"]["completion_tokens"] == 100
    assert len(pieces) > 10
    assert heard_at[-1] - heard_at[0] > 0.3, "the pieces came all at once"


def test_a_caller_who_leaves_frees_the_engine(
    service: Service, call: Callable[..., Caller]
) -> None:
    alpha = call()
    alpha.events(model=SLOW, max_new_tokens=900, on_event=lambda *_: True)
    service.wait_running(0, seconds=2)
    with pytest.raises(httpx.ReadTimeout):
        alpha.http.post(
            "/infer",
            json={"model": SLOW, "prompt": "Hello?", "max_new_tokens": 900},
            timeout=httpx.Timeout(5, read=0.5),
        )
    service.wait_running(0, seconds=3)
    started = time.monotonic()
    assert alpha.ask(max_new_tokens=4).status_code == 200
    assert time.monotonic() - started < 2
    assert "request_broke" not in service.api.text()


def test_a_team_that_asks_a_lot_delays_another_by_a_turn_and_not_by_its_queue(
    service: Service, call: Callable[..., Caller]
) -> None:
    alpha, beta = call("alpha"), call("beta")
    ended: list[str] = []
    lock = threading.Lock()

    def ask(caller: Caller, name: str) -> int:
        answer = caller.ask(name, max_new_tokens=100)
        with lock:
            ended.append(name)
        return answer.status_code

    with ThreadPoolExecutor(64) as pool:
        many = [pool.submit(ask, alpha, f"alpha {number}") for number in range(50)]
        service.wait_running(PLACES)
        before = len(ended)
        one = pool.submit(ask, beta, "beta")
        assert one.result() == 200
        assert {each.result() for each in many} == {200}
    # Those that ran already, one whose turn was before, and what ended while beta's was sent.
    assert ended.index("beta") - before <= 3 * PLACES


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_adapter_deleted_while_it_is_asked_answers_whole_or_is_gone(
    service: Service, call: Callable[..., Caller], tmp_path: Path
) -> None:
    alpha = call()
    with transaction(service.deployment.engine, read_only=True) as session:
        source = base_models.get(session, QUICK).source
    torch.manual_seed(0)
    adapted = get_peft_model(load_base_model(source), LoraConfig(r=4, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 2.0)
    write_adapter(tmp_path / "adapter", adapted, base_model_name=QUICK)
    kept = service.add_adapter(tmp_path / "adapter")
    told = alpha.ask(adapter=kept, model=None, max_new_tokens=40).json()["output"]
    assert told != alpha.ask(max_new_tokens=40).json()["output"]

    def ask(adapter: str) -> httpx.Response:
        return alpha.ask(adapter=adapter, model=None, max_new_tokens=40)

    codes: Counter[str] = Counter()
    with ThreadPoolExecutor(4) as pool:
        for number in range(12):
            adapter = service.add_adapter(tmp_path / "adapter")
            asked = [pool.submit(ask, adapter) for _ in range(4)]
            time.sleep(0.02 * number)
            gone = alpha.http.delete(f"/adapters/{adapter}")
            assert gone.status_code == 204, gone.text
            for answer in (each.result() for each in asked):
                codes[answer.json().get("code", "answered")] += 1
                if answer.status_code == 200:
                    assert answer.json()["output"] == told
            assert ask(adapter).json()["code"] == "not_found"

    assert codes["answered"] > 0
    assert codes.keys() <= {"answered", "not_found", "object_missing"}, codes


def test_a_worker_that_is_killed_is_noticed_and_the_next_one_answers(
    service: Service, call: Callable[..., Caller]
) -> None:
    alpha = call()
    heard = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(alpha.ask, model=SLOW, max_new_tokens=900)
        stream = pool.submit(
            alpha.events, model=SLOW, max_new_tokens=900, on_event=lambda *_: heard.set()
        )
        assert heard.wait(20)
        service.wait_running(2)
        service.worker.signal(signal.SIGKILL)
        killed = time.monotonic()
        answer, events = plain.result(), stream.result()
        noticed_seconds = time.monotonic() - killed
    assert (answer.status_code, answer.json()["code"]) == (503, "inference_worker_lost")
    assert int(answer.headers["Retry-After"]) >= 1
    assert {kind for kind, _ in events[:-1]} == {"delta"}
    assert events[-1][0] == "error"
    assert events[-1][1]["code"] == "inference_worker_lost"
    assert noticed_seconds < LOST_SECONDS + 2

    service.start_worker()
    assert alpha.ask(max_new_tokens=4).status_code == 200
    assert time.monotonic() - killed < 30


def test_a_worker_that_is_asked_to_stop_finishes_and_leaves_the_rest_to_the_next_one(
    service: Service, call: Callable[..., Caller]
) -> None:
    alpha = call()
    heard = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(
            alpha.events, model=SLOW, max_new_tokens=200, on_event=lambda *_: heard.set()
        )
        assert heard.wait(120)
        stopping = service.worker
        stopping.signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while "Warm shutdown" not in stopping.text() and time.monotonic() < deadline:
            time.sleep(0.01)
        following = pool.submit(alpha.ask, max_new_tokens=4)
        assert stream.result()[-1][0] == "done"
        assert stopping.wait(120) == 0
        assert not following.done()
        service.start_worker()
        assert following.result().status_code == 200


FAULTY_DEVICE = """
import importlib.abc
import importlib.util
import sys
from pathlib import Path

FAULT = Path({fault!r})


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.nn.modules.linear":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            forward = module.Linear.forward

            def faulty(self, input):
                if FAULT.exists():
                    torch = sys.modules["torch"]
                    kind, _, text = FAULT.read_text().partition(" ")
                    raise getattr(torch, kind)(text)
                return forward(self, input)

            module.Linear.forward = faulty

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def fault(service: Service, tmp_path: Path) -> Iterator[Path]:
    """A file: what it says, every matrix product of the worker raises.

    The worker before gives way to one that reads it; without the file it is a sound one.
    """
    code = FAULTY_DEVICE.format(fault=str(tmp_path / "fault"))
    (tmp_path / "sitecustomize.py").write_text(code)
    service.worker.stop()
    service.start_worker(PYTHONPATH=str(tmp_path))
    wait_served(service)
    yield tmp_path / "fault"
    (tmp_path / "fault").unlink(missing_ok=True)


def announce(fault: Path, text: str) -> None:
    partial = fault.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(fault)


def served_queues(service: Service) -> set[str]:
    with transaction(service.deployment.engine, read_only=True) as session:
        return {queue for one in workers.live_workers(session) for queue in one.queues}


def wait_served(service: Service) -> None:
    deadline = time.monotonic() + 240
    while "infer.cpu" not in served_queues(service):
        assert time.monotonic() < deadline, service.worker.text()[-3000:]
        time.sleep(0.05)


def test_a_request_without_room_on_the_device_is_refused_and_the_next_one_is_answered(
    service: Service, call: Callable[..., Caller], fault: Path
) -> None:
    alpha = call()
    assert alpha.ask(max_new_tokens=4).status_code == 200
    announce(fault, "OutOfMemoryError CUDA out of memory. Tried to allocate 2.00 GiB.")
    chat = {"model": QUICK, "messages": [{"role": "user", "content": "Hello?"}]}
    for answer, problem in (
        (found := alpha.ask(max_new_tokens=4), found.json()),
        (found := alpha.ask(max_new_tokens=4, stream=True), found.json()),
        (found := alpha.http.post("/v1/chat/completions", json=chat), found.json()["error"]),
    ):
        assert (answer.status_code, problem["code"]) == (503, "out_of_memory_device"), problem
        assert answer.headers["Retry-After"]
    fault.unlink()
    assert alpha.ask(max_new_tokens=4).status_code == 200
    assert service.worker.running


def test_a_worker_whose_device_is_lost_fails_what_it_has_ends_and_leaves_the_rest_to_the_next(
    service: Service, call: Callable[..., Caller], fault: Path
) -> None:
    alpha = call()
    assert alpha.ask(max_new_tokens=4).status_code == 200
    heard = threading.Event()
    with ThreadPoolExecutor(PLACES + 3) as pool:
        stream = pool.submit(
            alpha.events, model=SLOW, max_new_tokens=900, on_event=lambda *_: heard.set()
        )
        assert heard.wait(60)
        taken = [pool.submit(alpha.ask, model=SLOW, max_new_tokens=900) for _ in range(PLACES - 1)]
        service.wait_running(PLACES)
        waiting = [pool.submit(alpha.ask, max_new_tokens=4) for _ in range(2)]
        announce(fault, "AcceleratorError CUDA error: an illegal memory access was encountered")
        events, answers = stream.result(), [each.result() for each in taken]
        assert service.worker.wait() == EXIT_DEVICE_LOST
        assert "infer.cpu" not in served_queues(service)
        fault.unlink()
        service.start_worker()
        later = [each.result() for each in waiting]
    problems = [events[-1][1], *(answer.json() for answer in answers)]
    assert {problem["code"] for problem in problems} == {"inference_worker_lost"}, problems
    # Not by silence, after which it would be said to have died.
    assert all("device of the worker" in problem["detail"] for problem in problems), problems
    assert {answer.status_code for answer in answers} == {503}
    assert [answer.status_code for answer in later] == [200, 200]
    assert alpha.ask(max_new_tokens=4).status_code == 200


def test_a_request_that_alone_has_the_device_assert_is_refused_and_the_worker_ends(
    service: Service, call: Callable[..., Caller], fault: Path
) -> None:
    alpha = call()
    assert alpha.ask(max_new_tokens=4).status_code == 200
    announce(fault, "AcceleratorError CUDA error: device-side assert triggered")
    answer = alpha.ask(max_new_tokens=4)
    assert (answer.status_code, answer.json()["code"]) == (422, "inference_failed")
    assert answer.json()["errors"][0]["code"] == "device_assertion"
    assert service.worker.wait() == EXIT_DEVICE_LOST
    service.start_worker()
    wait_served(service)
    assert alpha.ask(max_new_tokens=4).status_code == 200
