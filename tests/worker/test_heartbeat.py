"""The lease is kept, lost, or given up when the database is silent."""

import queue
import threading
import time

import pytest

from store.attempts import Orders
from store.errors import LeaseLost, StorageUnavailable
from worker.heartbeat import Heartbeat

NOTHING = Orders(cancel=False, pause=False)


def test_orders_reach_the_supervisor() -> None:
    orders: queue.SimpleQueue[Orders] = queue.SimpleQueue()
    heartbeat = Heartbeat(
        lambda: Orders(cancel=True, pause=False),
        interval_seconds=0.01,
        lease_seconds=10,
        on_orders=orders.put,
        on_lost=lambda _reason: None,
    )
    heartbeat.start()

    assert orders.get(timeout=60).cancel
    heartbeat.stop()


def test_a_lost_lease_is_told_once_and_ends_the_beat() -> None:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    beats: list[float] = []

    def beat() -> Orders:
        beats.append(time.monotonic())
        raise LeaseLost("job_x", attempt=1)

    heartbeat = Heartbeat(
        beat,
        interval_seconds=0.01,
        lease_seconds=10,
        on_orders=lambda _orders: None,
        on_lost=lost.put,
    )
    heartbeat.start()

    assert "no longer holds the lease" in lost.get(timeout=60)
    time.sleep(0.2)  # twenty beats, if it went on
    heartbeat.stop()
    assert lost.empty()
    assert len(beats) == 1


@pytest.mark.slow
def test_a_silent_database_costs_the_lease_before_it_expires() -> None:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()

    def beat() -> Orders:
        raise StorageUnavailable("connection refused")

    started = time.monotonic()
    heartbeat = Heartbeat(
        beat,
        interval_seconds=0.02,
        lease_seconds=4,
        on_orders=lambda _orders: None,
        on_lost=lost.put,
    )
    heartbeat.start()

    assert "out of reach" in lost.get(timeout=60)
    assert 2 < time.monotonic() - started < 4
    heartbeat.stop()


def test_a_beat_that_hangs_is_noticed_by_the_supervisor() -> None:
    hangs = threading.Event()

    def beat() -> Orders:
        hangs.wait(60)
        return NOTHING

    heartbeat = Heartbeat(
        beat,
        interval_seconds=0.01,
        lease_seconds=1,
        on_orders=lambda _orders: None,
        on_lost=lambda _reason: None,
    )
    heartbeat.start()
    assert not heartbeat.expired
    deadline = time.monotonic() + 60
    while not heartbeat.expired:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    hangs.set()
    heartbeat.stop()
