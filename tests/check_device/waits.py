"""How often the host waits for the device, beside what is allowed."""

import dataclasses
from typing import Final

from grit_core.events import CurvatureObserved, Reprojected
from grit_core.training import _step
from grit_core.training_run import TrainingRun
from tests.accelerator.waits import Waits
from tests.check_device.check import Bench, Figure, Figures, check, require
from tests.check_device.devices import recorded_waits
from tests.check_device.serving import base_folder, build_request, engine_on
from tests.check_device.training import job_on, method_config

ORDINARY, OBSERVED, REPROJECTED, TOKEN = "ordinary", "observed", "reprojected", "token"

BUDGETS: Final = {ORDINARY: 3, OBSERVED: 8, REPROJECTED: 16, TOKEN: 1}
"""Most waits that the service's own code causes: in a step of training, and for a token."""

OURS: Final = "grit_core"
FEW, MANY = 4, 20


@check("a training step waits for the device no more often than allowed", in_short=True)
def training_waits(bench: Bench) -> Figures:
    config = dataclasses.replace(
        method_config(), fisher_update_freq=4, projection_update_freq=6, global_dropout=0.0
    )
    run = TrainingRun(job_on(bench, "waits", config=config, max_steps=14), num_threads=1)
    found: dict[str, list[Waits]] = {ORDINARY: [], OBSERVED: [], REPROJECTED: []}
    try:
        list(_step(run, 0.0))  # the start from the gradient
        for _ in range(12):
            with recorded_waits(bench.device) as waits:
                kinds = {type(event) for event in _step(run, 0.0)}
            kind = OBSERVED if CurvatureObserved in kinds else ORDINARY
            found[REPROJECTED if Reprojected in kinds else kind].append(waits)
    finally:
        run.close()
    figures: dict[str, Figure] = {}
    faults = []
    for kind, steps in found.items():
        require(bool(steps), f"No step was {kind}.")
        worst = max(steps, key=lambda waits: waits.count(OURS))
        figures[kind] = f"{worst.count(OURS)} of {BUDGETS[kind]}"
        figures[f"{kind}, elsewhere"] = worst.count() - worst.count(OURS)
        if worst.count(OURS) > BUDGETS[kind]:
            faults.append(f"{kind}: {_places(worst)}")
    require(not faults, f"{figures}; {'; '.join(faults)}")
    return figures


@check("a token is decoded with no more waits for the device than allowed", in_short=True)
def decoding_waits(bench: Bench) -> Figures:
    base = base_folder(bench)
    figures: dict[str, Figure] = {}
    faults = []
    for name, options in {
        "greedy": {},
        "sampled": {"temperature": 1.0, "top_p": 0.9, "seed": 3},
    }.items():
        counts = []
        with engine_on(bench.device) as engine:
            for tokens in (FEW, FEW, MANY):  # the first one loads the model
                request = build_request("Say something.", max_new_tokens=tokens, **options)
                with recorded_waits(bench.device) as waits:
                    answer = engine.generate(base, request)
                counts.append((answer.completion_tokens, waits.count(OURS)))
        (few, before), (many, after) = counts[1:]
        require(many > few, f"The answer ended after {many} tokens.")
        a_token = (after - before) / (many - few)
        figures[name] = f"{a_token:.2f} of {BUDGETS[TOKEN]}"
        if a_token > BUDGETS[TOKEN]:
            faults.append(f"{name}: {_places(waits)}")
    require(not faults, f"{figures}; {'; '.join(faults)}")
    return figures


def _places(waits: Waits) -> str:
    lines = [" ".join(line.split()) for line in repr(waits).splitlines() if f"{OURS}/" in line]
    return ", ".join(lines)
