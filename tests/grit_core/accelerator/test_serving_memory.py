"""Memory that runs out ends at most the request that needs it; all later answers are right."""

import gc
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import ref

import pytest
import torch

from grit_core.errors import InvalidConfig
from grit_core.generation import GenerationEngine
from tests.accelerator import Accelerator
from tests.accelerator.serving_sweep import Sweep, ask, ask_armed, held, question
from tests.tiny_models import tiny_causal_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

KINDS = {
    "load": 460,
    "second base": 390,
    "prefill": 130,
    "images": 70,
    "prefix": 70,
    "entry": 110,
    "eviction": 70,
    "join": 510,
    "step": 2900,
    "sampling": 590,
}
"""Each kind of point, and how far apart its samples are; `serving_sweep` runs all of them."""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    made = Sweep(tmp_path_factory.mktemp("models"))
    gc.collect()
    gc.freeze()  # the engine collects where memory runs out: what is there now is no part of it
    yield made
    gc.unfreeze()


@pytest.fixture
def engine(accelerator: Accelerator) -> Iterator[GenerationEngine]:
    made = GenerationEngine(device="sim", max_bases=1, max_adapters=2, max_batch=4)
    yield made
    accelerator.reset()
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_wherever_memory_ran_out_before(
    kind: str, sweep: Sweep, accelerator: Accelerator
) -> None:
    for point in sweep.run(accelerator, kind, every=KINDS[kind], first=17):
        assert not point.wrong, point


def test_one_allocation_that_fails_in_a_step_costs_no_one_an_answer(
    sweep: Sweep, accelerator: Accelerator, engine: GenerationEngine
) -> None:
    kind = sweep.kinds["step"]
    expected = sweep.expected("step", kind.asked)
    assert ask(engine, kind.asked) == expected
    for resident in engine._bases.values():
        resident.drop_caches()
    found = ask_armed(engine, kind.asked, arm=lambda: accelerator.run_out_at(1500))
    assert accelerator.num_refusals == 1
    assert found == expected


def test_where_a_step_is_too_large_the_longest_row_ends_and_the_others_go_on(
    sweep: Sweep, accelerator: Accelerator, engine: GenerationEngine
) -> None:
    base, adapters = sweep.base, sweep.adapters
    short = [question(base, "What?", adapter=a, image=None) for a in (adapters[0], None)]
    expected = sweep.expected("short", short)
    assert ask(engine, short) == expected
    long = question(base, "Which digit is this? " * 5, image=None, max_new_tokens=200)

    def fill() -> None:
        accelerator.capacity_bytes = accelerator.measure() + 160_000

    found = ask_armed(engine, [long, *short], arm=fill)
    accelerator.capacity_bytes = None
    assert isinstance(found[0], torch.OutOfMemoryError)
    assert "sim" in str(found[0])
    assert "infer_max_batch" in str(found[0])
    assert found[1:] == expected
    assert not any(held(engine))
    assert ask(engine, short) == expected


@pytest.mark.parametrize("device", ["sim", "cpu"])
def test_a_base_model_is_gone_before_the_next_one_is_loaded(
    device: str, sweep: Sweep, accelerator: Accelerator, tmp_path: Path
) -> None:
    """Eight loads of two models in the place of one, with image features, adapters and hooks."""
    engine = GenerationEngine(device=device, max_bases=1, max_adapters=2)
    other = str(tiny_causal_folder(tmp_path))
    asked = [
        question(sweep.base, "What?", adapter=sweep.adapters[1]),
        question(other, "What?", image=None),
    ]
    start = accelerator.measure()
    held_bytes: list[list[int]] = [[], []]
    gone = []
    try:
        for turn in range(8):
            found = ask(engine, [asked[turn % 2]])
            assert isinstance(found[0], str)
            assert not [each for each in gone if each() is not None]
            with engine._turn:  # the last step's tensors are gone
                held_bytes[turn % 2].append(accelerator.measure() - start)
            resident = engine._bases[asked[turn % 2].source]
            gone += [ref(parameter) for parameter in resident.model.parameters()]
            del resident
    finally:
        engine.close()
    assert all(len(set(each)) == 1 for each in held_bytes), held_bytes
    if device == "sim":
        assert accelerator.caches_emptied >= 7


def test_a_device_with_room_for_one_model_serves_two_in_turn(
    sweep: Sweep, accelerator: Accelerator, tmp_path: Path
) -> None:
    other = str(tiny_causal_folder(tmp_path))
    asked = [
        question(sweep.base, "What?", adapter=sweep.adapters[0]),
        question(other, "What?", image=None),
    ]
    expected = sweep.expected("in turn", asked)
    sizes = []
    for each in asked:
        engine = GenerationEngine(device="sim", max_adapters=2)
        accelerator.peak_bytes = start = accelerator.measure()
        ask(engine, [each])
        sizes.append(accelerator.peak_bytes - start)
        engine.close()
        del engine
    accelerator.capacity_bytes = accelerator.measure() + max(sizes)
    assert max(sizes) < sum(sizes)
    for max_bases in (1, 2):  # the second finds out when the memory is not there
        engine = GenerationEngine(device="sim", max_bases=max_bases, max_adapters=2)
        for _ in range(2):
            assert [ask(engine, [each])[0] for each in asked] == expected
        engine.close()
        del engine


def test_a_request_waits_until_the_device_has_memory_for_its_longest_answer(
    sweep: Sweep, accelerator: Accelerator
) -> None:
    engine = GenerationEngine(device="sim", prefix_cache_bytes=0)
    asked = [
        question(sweep.base, text, image=None, max_new_tokens=100) for text in ("What?", "Why?")
    ]
    expected = sweep.expected("one after the other", asked)
    ask(engine, [question(sweep.base, "What?", image=None)])
    resident = engine._bases[sweep.base]
    resident.drop_caches()
    # One of them fits with all of its tokens, and two do not.
    per_row = resident.key_bytes_per_token * 256
    accelerator.capacity_bytes = accelerator.measure() + 2 * per_row
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, engine.stats().num_active)
        return False

    def ask_one(index: int) -> str:
        each = asked[index]
        return engine.generate(each.source, each.request, should_stop=look).text

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask_one, range(2))) == expected
    assert accelerator.num_refusals == 0
    assert most == 1
    engine.close()


def test_a_request_that_waits_for_rows_leaves_the_caches_to_the_others(
    sweep: Sweep, accelerator: Accelerator
) -> None:
    """They would not make room enough: what is kept for other prompts stays."""
    engine = GenerationEngine(device="sim")
    kept = question(sweep.base, "How?", image=None)
    ask(engine, [question(sweep.base, "What?", image=None)])
    resident = engine._bases[sweep.base]
    resident.drop_caches()
    first = engine.generate(kept.source, kept.request)
    assert first.prompt_tokens - 1 > first.cached_prompt_tokens
    long = [
        question(sweep.base, "What?", image=None, max_new_tokens=40),
        question(sweep.base, "Why?", image=None, max_new_tokens=100),
    ]
    per_row = resident.key_bytes_per_token * 256
    accelerator.capacity_bytes = accelerator.measure() + per_row * 3 // 2
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, engine.stats().num_active)
        return False

    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda each: engine.generate(each.source, each.request, should_stop=look), long
            )
        )
    assert most == 1
    assert accelerator.num_refusals == 0
    accelerator.capacity_bytes = None
    again = engine.generate(kept.source, kept.request)
    assert again.cached_prompt_tokens == again.prompt_tokens - 1
    engine.close()


def test_a_request_that_the_device_can_never_hold_is_refused_with_its_numbers(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    base = str(tiny_causal_folder(tmp_path))
    config = Path(base) / "config.json"
    positions = {"max_position_embeddings": 1_000_000}
    config.write_text(json.dumps({**json.loads(config.read_text()), **positions}))
    engine = GenerationEngine(device="sim", max_bases=1)
    small = question(base, "What?", image=None)
    accelerator.capacity_bytes = accelerator.measure() + 2_000_000
    assert isinstance(ask(engine, [small])[0], str)
    limit = engine._bases[base].max_device_tokens
    assert limit is not None
    assert 1000 < limit < 1_000_000
    long = question(base, "What?", image=None, max_new_tokens=limit)
    (error,) = ask(engine, [long])
    assert isinstance(error, InvalidConfig)
    assert f"maximum context length is {limit} tokens on the device sim" in str(error)
    assert error.faults[0].pointer == "/max_new_tokens"
    engine.close()


def test_a_bound_on_the_keys_lets_a_request_wait_and_the_only_one_pass(
    sweep: Sweep, accelerator: Accelerator
) -> None:
    assert accelerator.capacity_bytes is None
    engine = GenerationEngine(device="sim", max_key_bytes=1)
    asked = [question(sweep.base, text, image=None) for text in ("What?", "Why?", "Who?")]
    expected = sweep.expected("one by one", asked)
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, engine.stats().num_active)
        return False

    def ask_one(index: int) -> str:
        each = asked[index]
        return engine.generate(each.source, each.request, should_stop=look).text

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask_one, range(3))) == expected
    assert most <= 1
    engine.close()
