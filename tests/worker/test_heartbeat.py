"""The lease is kept, lost, or given up when the database is silent."""

import queue
import time

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

    assert orders.get(timeout=5).cancel
    heartbeat.stop()


def test_a_lost_lease_is_told_once_and_ends_the_beat() -> None:
    lost: list[str] = []
    beats: list[float] = []

    def beat() -> Orders:
        beats.append(time.monotonic())
        raise LeaseLost("job_x", attempt=1)

    heartbeat = Heartbeat(
        beat,
        interval_seconds=0.01,
        lease_seconds=10,
        on_orders=lambda _orders: None,
        on_lost=lost.append,
    )
    heartbeat.start()
    time.sleep(0.3)
    heartbeat.stop()

    assert len(lost) == len(beats) == 1
    assert "no longer holds the lease" in lost[0]


def test_a_silent_database_costs_the_lease_before_it_expires() -> None:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()

    def beat() -> Orders:
        raise StorageUnavailable("connection refused")

    started = time.monotonic()
    heartbeat = Heartbeat(
        beat,
        interval_seconds=0.02,
        lease_seconds=0.8,
        on_orders=lambda _orders: None,
        on_lost=lost.put,
    )
    heartbeat.start()

    assert "out of reach" in lost.get(timeout=5)
    assert 0.5 < time.monotonic() - started < 0.8
    heartbeat.stop()


def test_a_beat_that_hangs_is_noticed_by_the_supervisor() -> None:
    heartbeat = Heartbeat(
        lambda: time.sleep(0.5) or NOTHING,
        interval_seconds=0.01,
        lease_seconds=0.2,
        on_orders=lambda _orders: None,
        on_lost=lambda _reason: None,
    )
    heartbeat.start()
    assert not heartbeat.expired
    time.sleep(0.3)

    assert heartbeat.expired
    heartbeat.stop()
