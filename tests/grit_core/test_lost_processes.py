"""A process that ends or hangs is noticed by the others: on the CPU, and before a card would wait.

No card is needed. torch's own fake backend stands for NCCL on a device without data: its calls
return at once and never fail, as NCCL's do when a process is missing.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch._C._distributed_c10d import FakeProcessGroup

from grit_core.processes import Processes, ProcessLost, joined
from tests.grit_core.process_groups import own_file, run_together

TIMEOUT_SECONDS = 10


def on_a_card(rank: int, folder: Path, how: str) -> None:
    """Add up on a device of its own kind while the second process ends or hangs."""
    store = distributed.distributed_c10d._get_default_store()
    distributed.destroy_process_group()
    distributed.Backend.register_backend(
        "queue",
        lambda _store, rank, size, _timeout: FakeProcessGroup._create_internal(rank, size),
        devices=["meta"],
    )
    distributed.init_process_group(
        "cpu:gloo,meta:queue",
        store=distributed.PrefixStore("card", store),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    processes = Processes.current()
    processes.add_up(torch.ones(1, device="meta"))
    if rank == 1:
        if how == "hangs":
            while not own_file(folder, "lost", 0).exists():
                time.sleep(0.1)
        os._exit(0)
    began = time.monotonic()
    try:
        processes.add_up(torch.ones(1, device="meta"))
    except ProcessLost as error:
        own_file(folder, "lost", rank).write_text(f"{time.monotonic() - began} {error}")
    own_file(folder, "done", rank).touch()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_message_on_a_card_is_not_begun_without_a_process_that(tmp_path: Path, how: str) -> None:
    run_together(on_a_card, tmp_path, how, deadline_seconds=60)
    told = own_file(tmp_path, "lost", 0).read_text()
    seconds, _, message = told.partition(" ")
    assert message.startswith("Process 0 of 2 lost another one")
    if how == "hangs":
        assert float(seconds) >= TIMEOUT_SECONDS - 1


def test_a_process_on_a_card_is_bound_to_it_and_waits_in_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch is asked for; the card itself is not there."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: asked.update(card=index))
    monkeypatch.setattr(distributed, "init_process_group", asked.update)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    with joined("cuda", timeout_seconds=3) as device:
        assert device == "cuda:1"
        assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1"
    assert asked == {
        "card": 1,
        "backend": "cpu:gloo,cuda:nccl",
        "device_id": torch.device("cuda:1"),
        "timeout": timedelta(seconds=3),
    }
