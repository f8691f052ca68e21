"""Answers on an accelerator are those of the CPU, for every kind of request, alone and together."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from grit_core.errors import DeviceUnavailable, Interrupted
from grit_core.generation import GenerationEngine
from grit_core.grammars import json_schema_grammar
from tests.accelerator import Accelerator
from tests.accelerator.serving_sweep import Question, Sweep, ask, ask_armed, held, question
from tests.grit_core.serving.test_resident_model import sliding_window_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(accelerator: Accelerator) -> Iterator[GenerationEngine]:
    made = GenerationEngine(device="sim", max_adapters=2)
    yield made
    accelerator.reset()
    made.close()


READING = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


def every_kind(base: str, sweep: Sweep, *, image: int | None = 3) -> list[Question]:
    """Greedy and sampled, held to a grammar and ended by a text, for more adapters than places."""
    a, b, c = sweep.adapters
    held_to = json_schema_grammar(READING)
    return [
        question(base, "Which?", adapter=a, image=image, max_new_tokens=12),
        question(base, "Why?", adapter=b, image=image, temperature=1.5, seed=4),
        question(base, "Who?", image=image, grammar=held_to, max_new_tokens=20),
        question(base, "What?", adapter=c, image=image, temperature=0.7, top_p=0.8, seed=9),
        question(base, "How?", adapter=a, image=image, stop=("7",), max_new_tokens=12),
        question(base, "Hm?", adapter=b, grammar=held_to, temperature=1.0, seed=2, image=image),
    ]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_requests_of_every_kind_at_once_are_answered_as_on_the_cpu(
    penalty: float, sweep: Sweep, engine: GenerationEngine, tmp_path: Path
) -> None:
    """Sampled answers are equal for a seed as long as the logits are: the draw is the host's."""
    base = sweep.base
    if penalty != 1:
        base = str(shutil.copytree(sweep.base, tmp_path / "penalized"))
        file = Path(base) / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": penalty}))
    asked = every_kind(base, sweep)
    expected = sweep.expected(f"every kind {penalty}", asked)
    assert all(isinstance(each, str) for each in expected), expected
    ask(engine, asked[:1])  # loads the model
    for _ in range(2):  # the second time with images and prefixes that are kept
        assert ask(engine, asked) == expected
    stats = engine.stats()
    assert stats.image_hits > 0
    assert stats.prefix_hits > 0
    assert stats.resident_adapters == 2
    assert not any(held(engine))


def test_a_model_that_answers_alone_answers_as_on_the_cpu(
    sweep: Sweep, engine: GenerationEngine, tmp_path: Path
) -> None:
    base = sliding_window_folder(tmp_path)
    asked = [
        question(base, "What?", image=None, max_new_tokens=8),
        question(base, "Who?", image=None, grammar=json_schema_grammar(READING)),
    ]
    assert [ask(engine, [each])[0] for each in asked] == sweep.expected("alone", asked)
    assert not engine._bases[base].shares_steps


def test_memory_that_runs_out_before_a_lone_answer_begins_is_made_room_for(
    sweep: Sweep, engine: GenerationEngine, accelerator: Accelerator, tmp_path: Path
) -> None:
    base = sliding_window_folder(tmp_path)
    asked = [question(base, "What?", image=None, max_new_tokens=8)]
    expected = sweep.expected("lone", asked)
    assert ask(engine, asked) == expected
    for allocation, times in ((3, 1), (40, 1), (3, 10**6), (250, 10**6)):
        (found,) = ask_armed(
            engine,
            asked,
            arm=lambda: accelerator.run_out_at(allocation, times=times),  # noqa: B023 - called now
        )
        accelerator.run_out_at(0)
        assert found == expected[0] or (times > 1 and isinstance(found, torch.OutOfMemoryError))
        assert ask(engine, asked) == expected


def test_a_request_that_is_cancelled_leaves_the_others_as_on_the_cpu(
    sweep: Sweep, engine: GenerationEngine
) -> None:
    other = question(sweep.base, "What?", adapter=sweep.adapters[1], max_new_tokens=20)
    expected = sweep.expected("beside", [other])
    long = question(sweep.base, "Which?", adapter=sweep.adapters[0], max_new_tokens=900)
    pieces: list[str] = []
    ask(engine, [other])
    with ThreadPoolExecutor(1) as pool:
        cancelled = pool.submit(
            engine.generate,
            long.source,
            long.request,
            adapter=long.adapter,
            on_text=pieces.append,
            should_stop=lambda: len(pieces) > 2,
        )
        assert ask(engine, [other]) == expected
        with pytest.raises(Interrupted):
            cancelled.result()
    assert ask(engine, [other]) == expected


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
    ],
)
def test_a_device_that_failed_for_good_fails_all_requests_and_takes_no_more(
    message: str, sweep: Sweep, engine: GenerationEngine, accelerator: Accelerator
) -> None:
    asked = [
        question(sweep.base, text, adapter=adapter, max_new_tokens=30)
        for text, adapter in zip("abcdef", [None, *sweep.adapters, None, None], strict=True)
    ]
    ask(engine, asked[:1])
    assert engine.lost is None
    found = ask_armed(engine, asked, arm=lambda: accelerator.fail(message))
    assert [type(each) for each in found] == [torch.AcceleratorError] * len(asked)
    assert engine.lost is not None
    assert message in engine.lost
    accelerator.reset()  # the process cannot know: it is the next one that finds the device well
    (later,) = ask(engine, asked[:1])
    assert isinstance(later, DeviceUnavailable)
    assert message in str(later)
    assert isinstance(later.__cause__, torch.AcceleratorError)


def test_a_device_that_fails_while_a_model_is_loaded_is_lost(
    sweep: Sweep, engine: GenerationEngine, accelerator: Accelerator
) -> None:
    accelerator.fail()
    first, second = (ask(engine, [question(sweep.base, "What?")])[0] for _ in range(2))
    assert isinstance(first, torch.AcceleratorError)
    assert isinstance(second, DeviceUnavailable)
    assert engine.lost is not None
