"""The quality benchmark: resumable, its optima inside the grid, its arithmetic right."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.quality import sweep
from benchmarks.quality.analysis import (
    best_peer,
    crossing,
    paired_ratio,
    retention_table,
    summarise,
    table,
)
from benchmarks.quality.methods import METHODS
from benchmarks.quality.records import Records
from benchmarks.quality.runs import run
from benchmarks.quality.step_ratio import measure, ratios
from benchmarks.quality.subjects import digits

CURVE = [
    {"step": 0.0, "loss": 1.0, "retention": 0.0},
    {"step": 10.0, "loss": 0.6, "retention": 0.4},
    {"step": 20.0, "loss": 0.4, "retention": 0.5},
]


def record_of(method, rate, seed, *, final, loss):
    points = [{**point, "loss": point["loss"] * loss} for point in CURVE]
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "final": final,
        "loss": loss,
        "failure": None,
        "points": points,
        "parameters": 100,
        "extra_passes": METHODS[method].extra_passes,
        "layers": None,
    }


def fill_sweep(records, method, *, best):
    """Record a sweep whose loss is lowest at a rate, for as long as the sweep asks for more."""
    while True:
        missing, found = sweep.sweep_runs(records, method)
        if found is not None:
            return found
        for name, rate, seed, final in missing:
            loss = 1.0 + abs(math.log10(rate / best))
            records.add(record_of(name, rate, seed, final=final, loss=loss))


@pytest.fixture(scope="module")
def small_digits():
    whole = digits.subject()
    return dataclasses.replace(
        whole,
        train_rows=whole.train_rows[:16],
        selection_rows=whole.selection_rows[:4],
        report_rows=whole.report_rows[:4],
        retention_rows=whole.retention_rows[:4],
        batch_size=2,
        num_steps=3,
        eval_every=2,
    )


def test_a_target_is_reached_between_two_evaluations():
    found = crossing(CURVE, 0.5)
    assert found["step"] == pytest.approx(15)
    assert found["retention"] == pytest.approx(0.45)


def test_passes_before_the_first_step_count_as_steps():
    assert crossing(CURVE, 0.5, extra_steps=2)["step"] == pytest.approx(17)


def test_a_target_that_is_never_reached_stays_never():
    assert math.isinf(crossing(CURVE, 0.3)["step"])


def test_ratios_are_paired_by_seed_and_keep_never():
    ratio = paired_ratio([5.0, 10.0, math.inf], [10.0, 10.0, 10.0])
    assert ratio["median"] == 1.0
    assert math.isinf(ratio["high"])
    assert math.isnan(paired_ratio([math.inf], [math.inf])["median"])


def test_arriving_where_the_other_never_does_is_a_bound_and_not_a_ratio_of_zero():
    bounded = paired_ratio([40.0, 20.0, 30.0], [math.inf, 40.0, math.inf], limit=80)
    assert (bounded["median"], bounded["bound"]) == (0.5, 1)
    decided = paired_ratio([40.0, 90.0, 100.0], [math.inf, 100.0, 100.0], limit=80)
    assert (decided["median"], decided["bound"]) == (0.9, 0)


def test_what_is_retained_is_compared_on_seeds_that_both_arrive():
    ratio = paired_ratio([0.3, 0.4, math.nan], [0.6, math.nan, 0.1])
    assert (ratio["median"], ratio["num_pairs"]) == (0.5, 1)


def test_the_best_peer_is_neither_adamw_nor_ours():
    steps = {"adamw": 1, "trainer": 1, "ekfac": 1, "dora": 8, "adalora": 5}
    finals = {
        name: [
            {
                "extra_passes": 0,
                "points": [
                    {"step": 0.0, "loss": 1.0, "retention": 0.0},
                    {"step": float(count), "loss": 0.5, "retention": 0.0},
                ],
            }
        ]
        for name, count in steps.items()
    }
    assert best_peer(finals, 0.5) == "adalora"


@pytest.mark.parametrize("best", [1e-4, 5.6e-3, 1e-1])
def test_a_sweep_moves_until_its_best_rate_is_inside(tmp_path, best):
    records = Records(tmp_path / "sweep.jsonl")
    found = fill_sweep(records, "adamw", best=best)
    rates = sorted(record["rate"] for record in records.all())
    assert math.log10(found) == pytest.approx(math.log10(best), abs=0.13)
    assert len(rates) >= sweep.POINTS
    assert rates[0] < found < rates[-1]


def test_a_sweep_that_diverges_everywhere_but_once_still_ends(tmp_path):
    records = Records(tmp_path / "sweep.jsonl")
    while True:
        missing, found = sweep.sweep_runs(records, "adamw")
        if found is not None:
            break
        for name, rate, seed, final in missing:
            loss = 1.0 if rate < 1.1e-3 else math.inf
            records.add(record_of(name, rate, seed, final=final, loss=loss))
    assert len(list(records.all())) <= sweep.MOST_POINTS
    assert found <= 1.1e-3


def test_what_is_recorded_is_not_run_again(tmp_path):
    path = tmp_path / "sweep.jsonl"
    best = fill_sweep(Records(path), "adamw", best=5.6e-3)
    path.write_text(
        path.read_text() + '{"method": "adamw", "rate"'
    )  # a kill in the middle of a line
    records = Records(path)
    wanted = list(sweep.next_runs(records, ["adamw"]))
    assert wanted == [("adamw", best, seed, True) for seed in sweep.SEEDS]
    records.add(record_of("adamw", best, 0, final=True, loss=1.0))
    assert list(sweep.next_runs(Records(path), ["adamw"])) == wanted[1:]


def test_a_kill_in_the_very_first_line_costs_no_later_record(tmp_path):
    path = tmp_path / "sweep.jsonl"
    path.write_text('{"method": "adamw", "rate"')
    Records(path).add(record_of("adamw", 1e-3, 0, final=True, loss=1.0))
    assert Records(path).get("adamw", 1e-3, 0, final=True) is not None


def test_a_summary_compares_with_adamw_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.records.FOLDER", tmp_path)
    records = Records.of("digits")
    for method, loss in (("adamw", 1.0), ("dora", 0.5)):
        best = fill_sweep(records, method, best=METHODS[method].learning_rate)
        for seed in sweep.SEEDS:
            records.add(record_of(method, best, seed, final=True, loss=loss))
    summary = summarise("digits", (0.45, 0.4, 0.1))
    told = summary["methods"]["dora"]
    assert set(summary["methods"]) == {"adamw", "dora"}
    assert told["final_ratio"]["median"] == pytest.approx(0.5)
    assert told["targets"][1]["steps"] == pytest.approx([5.0] * len(sweep.SEEDS))
    assert told["targets"][1]["ratio"]["median"] == pytest.approx(5 / 20)
    assert told["interior"]
    assert told["targets"][1]["retention_ratio"]["median"] == pytest.approx(0.2 / 0.5)
    assert "never" in table(summary)
    assert "both on 0 of 5 seeds" in retention_table(summary)


@pytest.mark.parametrize("method", ["adamw", "ekfac", "budget", "adalora"])
def test_a_run_is_a_record_and_the_same_record_again(small_digits, method):
    first, again = (run(small_digits, method, rate=1e-3, seed=0, final=True) for _ in range(2))
    assert first["points"] == again["points"]
    assert [point["step"] for point in first["points"]] == [0.0, 2.0, 3.0]
    assert first["failure"] is None
    assert json.loads(json.dumps(first))["loss"] == first["points"][-1]["loss"]


def test_all_methods_of_plain_lora_start_from_the_same_adapter(small_digits):
    starts = []
    for method in ("adamw", "riemannian", "dora", "ekfac"):
        arm = METHODS[method].build(small_digits, 1e-3, 7)
        named = sorted((n, p) for n, p in arm.model.named_parameters() if "lora_A" in n)
        starts.append(torch.cat([p.detach().flatten() for _, p in named]))
    assert all(torch.equal(starts[0], start) for start in starts[1:])


@pytest.mark.parametrize("method", ["adamw", "trainer", "riemannian", "ekfac"])
def test_a_run_that_diverges_is_recorded_as_such(small_digits, method):
    record = run(small_digits, method, rate=1e30, seed=0, final=False)
    assert record["failure"] is not None
    assert math.isinf(record["loss"])


def test_step_times_are_taken_in_turns_and_set_against_adamw(small_digits):
    longer = dataclasses.replace(small_digits, num_steps=4)
    seconds = measure(longer, ["adamw", "ekfac"], num_periods=1, period_steps=2)
    assert {name: len(spent) for name, spent in seconds.items()} == {"adamw": 1, "ekfac": 1}
    assert ratios(seconds)["adamw"]["median_ratio"] == 1.0
    with pytest.raises(ValueError, match="ask for fewer"):
        measure(longer, ["adamw"], num_periods=2, period_steps=2)
