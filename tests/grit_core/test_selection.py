import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.config.model_configs import LayerSelectionStrategy, Modality, ModalityConfig
from grit_core.errors import InvalidConfig
from grit_core.inventory import LayerRecord
from grit_core.selection import blocks_of, select_layers

Strategy = LayerSelectionStrategy
KINDS = ("q_proj", "v_proj", "up_proj")


def layers_of(blocks: list[int | None], kinds: tuple[str, ...] = KINDS) -> list[LayerRecord]:
    return [
        LayerRecord(f"m.{'head' if b is None else f'layers.{b}'}.{k}", Modality.TEXT, b, 8, 8)
        for b in blocks
        for k in kinds
    ]


def blocks_kept(config: ModalityConfig, depth: int = 12) -> list[int | None]:
    selection = select_layers(layers_of(list(range(depth))), config)
    return [block.index for block in blocks_of(selection.kept)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[LayerRecord], ModalityConfig, int | None]:
    """Matched layers in any order, a strategy that fits them, and a cap."""
    present = draw(st.sets(st.integers(0, 40), min_size=3, max_size=12))
    layers = layers_of([*present, *([None] if draw(st.booleans()) else [])])
    layers = [layer for layer in layers if layer.name.endswith("q_proj") or draw(st.booleans())]
    layers = draw(st.permutations(layers))
    indices = draw(st.lists(st.sampled_from(sorted(present)), min_size=1, max_size=4))
    config = ModalityConfig(
        strategy=draw(st.sampled_from(Strategy)),
        n_layers=draw(st.integers(1, len(present))),
        step_size=draw(st.integers(1, 50)),
        specific_indices=indices,
    )
    return layers, config, draw(st.none() | st.integers(1, 60))


def depth_of(layer: LayerRecord) -> float:
    return float("inf") if layer.block is None else layer.block


@given(requests())
def test_what_is_kept_and_dropped_are_parts_of_what_matched(
    request: tuple[list[LayerRecord], ModalityConfig, int | None],
) -> None:
    layers, config, cap = request
    selection = select_layers(layers, config, max_layers=cap)
    names = [layer.name for layer in (*selection.kept, *selection.dropped)]
    assert len(names) == len(set(names))
    assert set(names) <= {layer.name for layer in layers}
    assert selection.kept


@given(requests())
def test_kept_layers_stand_in_depth_order(
    request: tuple[list[LayerRecord], ModalityConfig, int | None],
) -> None:
    layers, config, cap = request
    depths = [depth_of(layer) for layer in select_layers(layers, config, max_layers=cap).kept]
    assert depths == sorted(depths)


@given(requests())
def test_the_cap_keeps_the_end_that_the_strategy_prefers(
    request: tuple[list[LayerRecord], ModalityConfig, int | None],
) -> None:
    layers, config, cap = request
    chosen = select_layers(layers, config).kept
    capped = select_layers(layers, config, max_layers=cap)
    bound = len(chosen) if cap is None else min(cap, len(chosen))
    assert len(capped.kept) == bound
    if config.strategy == Strategy.LAST_N:
        assert capped.dropped + capped.kept == chosen
    else:
        assert capped.kept + capped.dropped == chosen


@given(requests())
def test_a_chosen_block_brings_every_matched_layer_of_it(
    request: tuple[list[LayerRecord], ModalityConfig, int | None],
) -> None:
    layers, config, _ = request
    kept = select_layers(layers, config).kept
    blocks = {layer.block for layer in kept}
    assert {layer.name for layer in layers if layer.block in blocks} == {x.name for x in kept}


@given(requests())
def test_the_order_of_the_matched_blocks_does_not_matter(
    request: tuple[list[LayerRecord], ModalityConfig, int | None],
) -> None:
    layers, config, _ = request
    shuffled = sorted(layers, key=lambda layer: layer.name)
    one, other = select_layers(layers, config), select_layers(shuffled, config)
    assert {layer.name for layer in one.kept} == {layer.name for layer in other.kept}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModalityConfig(), list(range(12))),
        (ModalityConfig(strategy=Strategy.FIRST_N, n_layers=3), [0, 1, 2]),
        (ModalityConfig(strategy=Strategy.LAST_N, n_layers=3), [9, 10, 11]),
        (ModalityConfig(strategy=Strategy.EVERY_NTH, step_size=2), [0, 2, 4, 6, 8, 10]),
        (ModalityConfig(strategy=Strategy.EVERY_NTH, step_size=5), [0, 5, 10]),
        (ModalityConfig(strategy=Strategy.EVERY_NTH, step_size=99), [0]),
        (ModalityConfig(strategy=Strategy.SPECIFIC, specific_indices=[10, 0, 5, 5]), [0, 5, 10]),
        (ModalityConfig(strategy=Strategy.SKIP_FIRST_LAST), list(range(1, 11))),
        (ModalityConfig(strategy=Strategy.FIRST_N, n_layers=12), list(range(12))),
    ],
    ids=[
        "all",
        "first 3",
        "last 3",
        "every 2nd",
        "every 5th",
        "every 99th",
        "named",
        "inner",
        "first 12",
    ],
)
def test_each_strategy_picks_these_of_twelve_blocks(
    config: ModalityConfig, expected: list[int]
) -> None:
    assert blocks_kept(config) == expected


def test_a_strategy_given_as_text_is_the_same() -> None:
    config = ModalityConfig(strategy="first_n", n_layers=2)  # type: ignore[arg-type] # from JSON
    assert blocks_kept(config) == [0, 1]


def test_layers_without_an_index_are_one_block_at_the_end() -> None:
    layers = layers_of([None, 1, 0])
    last = select_layers(layers, ModalityConfig(strategy=Strategy.LAST_N, n_layers=1))
    assert [layer.block for layer in last.kept] == [None] * 3
    assert [block.index for block in blocks_of(layers)] == [0, 1, None]


def test_index_zero_means_the_one_block_of_a_connector() -> None:
    config = ModalityConfig(strategy=Strategy.SPECIFIC, specific_indices=[0])
    assert len(select_layers(layers_of([None]), config).kept) == 3


def test_specific_indices_are_those_in_the_names() -> None:
    config = ModalityConfig(strategy=Strategy.SPECIFIC, specific_indices=[7])
    assert [x.block for x in select_layers(layers_of([5, 7, 9], ("q",)), config).kept] == [7]


@pytest.mark.parametrize(
    ("config", "depth", "pointer", "words"),
    [
        (
            ModalityConfig(strategy=Strategy.FIRST_N, n_layers=13),
            12,
            "/config/text/n_layers",
            ["13", "12 blocks", "give 1 to 12"],
        ),
        (
            ModalityConfig(strategy=Strategy.LAST_N, n_layers=2),
            1,
            "/config/text/n_layers",
            ["2", "1 block;"],
        ),
        (
            ModalityConfig(strategy=Strategy.SPECIFIC, specific_indices=[0, 12]),
            12,
            "/config/text/specific_indices/1",
            ["block 12", "blocks 0-11"],
        ),
        (
            ModalityConfig(strategy=Strategy.SKIP_FIRST_LAST),
            2,
            "/config/text/strategy",
            ["2 blocks", "at least 3"],
        ),
    ],
)
def test_asking_for_blocks_that_are_not_there_names_value_bound_and_fix(
    config: ModalityConfig, depth: int, pointer: str, words: list[str]
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        select_layers(layers_of(list(range(depth))), config, pointer="/config/text")
    (fault,) = caught.value.faults
    assert fault.pointer == pointer
    for word in words:
        assert word in fault.detail


def test_every_missing_index_is_a_fault_of_its_own() -> None:
    config = ModalityConfig(strategy=Strategy.SPECIFIC, specific_indices=[1, 4, 6, 9])
    with pytest.raises(InvalidConfig) as caught:
        select_layers(layers_of([0, 1, 2, 4, 7, 8]), config)
    assert [fault.input for fault in caught.value.faults] == [6, 9]
    assert "blocks 0-2, 4, 7-8" in caught.value.faults[0].detail


@given(st.integers(1, 30), st.integers(1, 30))
def test_every_nth_keeps_the_ceiling_of_the_share(depth: int, step: int) -> None:
    config = ModalityConfig(strategy=Strategy.EVERY_NTH, step_size=step)
    assert len(blocks_kept(config, depth)) == -(-depth // step)
