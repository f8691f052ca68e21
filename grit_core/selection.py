"""Strategies choose blocks, the cap counts layers.

The matched layers are grouped by their block's index, in ascending order; layers without an index
form one block of their own, which comes last. A strategy chooses among these blocks, and every
matched layer of a chosen block is adapted, unless `max_layers` cuts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grit_core.config.model_configs import LayerSelectionStrategy, ModalityConfig
from grit_core.errors import Fault, InvalidConfig
from grit_core.inventory import LayerRecord


@dataclass(frozen=True, slots=True)
class Block:
    """The matched layers of one block of the model."""

    index: int | None
    """`None` gathers the layers outside of any list of blocks."""
    layers: tuple[LayerRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What a strategy and the cap left of the matched layers, both parts in depth order."""

    kept: tuple[LayerRecord, ...]
    dropped: tuple[LayerRecord, ...]
    """Chosen by the strategy, then cut by the cap."""
    reason: str
    """What the strategy did, in words."""


def blocks_of(layers: Sequence[LayerRecord]) -> list[Block]:
    """Group layers by block, in depth order; within a block they keep the model's order."""
    grouped: dict[int | None, list[LayerRecord]] = {}
    for layer in layers:
        grouped.setdefault(layer.block, []).append(layer)
    numbered = sorted(index for index in grouped if index is not None)
    order: list[int | None] = [*numbered, *([None] if None in grouped else [])]
    return [Block(index, tuple(grouped[index])) for index in order]


def select_layers(
    layers: Sequence[LayerRecord],
    config: ModalityConfig,
    *,
    max_layers: int | None = None,
    pointer: str = "",
) -> Selection:
    """Choose among the matched layers of one modality.

    Args:
        layers: All layers that the patterns matched, in the model's order; at least one.
        config: Its strategy, with the strategy's parameter set and within its bounds.
        max_layers: Keep at most so many, nearest the end that the strategy prefers: the last ones
            for `last_n`, the first ones otherwise.
        pointer: Where the configuration stands in the caller's request.

    Raises:
        InvalidConfig: The strategy asks for blocks that are not there, or leaves none.
    """
    blocks = blocks_of(layers)
    strategy = LayerSelectionStrategy(config.strategy)
    faults = _faults(blocks, strategy, config, pointer=pointer)
    if faults:
        raise InvalidConfig(faults)
    chosen = [layer for block in _CHOICES[strategy](blocks, config) for layer in block.layers]
    kept, dropped = _capped(chosen, max_layers, from_end=strategy == LayerSelectionStrategy.LAST_N)
    return Selection(
        kept=tuple(kept), dropped=tuple(dropped), reason=_reason(strategy, config, len(blocks))
    )


def _first_n(blocks: list[Block], config: ModalityConfig) -> list[Block]:
    return blocks[: config.n_layers]


def _last_n(blocks: list[Block], config: ModalityConfig) -> list[Block]:
    return blocks[len(blocks) - (config.n_layers or 0) :]


def _every_nth(blocks: list[Block], config: ModalityConfig) -> list[Block]:
    return blocks[:: config.step_size]


def _specific(blocks: list[Block], config: ModalityConfig) -> list[Block]:
    wanted = set(config.specific_indices or ())
    return [block for block in blocks if _own_index(block, blocks) in wanted]


_CHOICES: dict[LayerSelectionStrategy, Callable[[list[Block], ModalityConfig], list[Block]]] = {
    LayerSelectionStrategy.ALL: lambda blocks, _: blocks,
    LayerSelectionStrategy.FIRST_N: _first_n,
    LayerSelectionStrategy.LAST_N: _last_n,
    LayerSelectionStrategy.EVERY_NTH: _every_nth,
    LayerSelectionStrategy.SPECIFIC: _specific,
    LayerSelectionStrategy.SKIP_FIRST_LAST: lambda blocks, _: blocks[1:-1],
}


def _own_index(block: Block, blocks: list[Block]) -> int | None:
    """The index that `specific_indices` means: the block's own; 0 when nothing is numbered."""
    return 0 if block.index is None and len(blocks) == 1 else block.index


def _capped(
    chosen: list[LayerRecord], max_layers: int | None, *, from_end: bool
) -> tuple[list[LayerRecord], list[LayerRecord]]:
    if max_layers is None or len(chosen) <= max_layers:
        return chosen, []
    if from_end:
        cut = len(chosen) - max_layers
        return chosen[cut:], chosen[:cut]
    return chosen[:max_layers], chosen[max_layers:]


def _faults(
    blocks: list[Block], strategy: LayerSelectionStrategy, config: ModalityConfig, *, pointer: str
) -> list[Fault]:
    count = len(blocks)
    if strategy in {LayerSelectionStrategy.FIRST_N, LayerSelectionStrategy.LAST_N}:
        if config.n_layers is not None and config.n_layers > count:
            return [
                Fault(
                    pointer=f"{pointer}/n_layers",
                    code="out_of_range",
                    detail=f"n_layers is {config.n_layers} and the patterns match layers in {count}"
                    f" {_blocks_word(count)}; give 1 to {count}, or take the strategy all.",
                    input=config.n_layers,
                )
            ]
    elif strategy == LayerSelectionStrategy.SPECIFIC:
        return _index_faults(blocks, config, pointer=f"{pointer}/specific_indices")
    elif strategy == LayerSelectionStrategy.SKIP_FIRST_LAST and count < 3:
        return [
            Fault(
                pointer=f"{pointer}/strategy",
                code="nothing_left",
                detail=f"skip_first_last leaves nothing of {count} {_blocks_word(count)}; it needs"
                " at least 3. Take the strategy all.",
                input=str(strategy),
            )
        ]
    return []


def _index_faults(blocks: list[Block], config: ModalityConfig, *, pointer: str) -> list[Fault]:
    known = {_own_index(block, blocks) for block in blocks}
    numbers = sorted(index for index in known if index is not None)
    return [
        Fault(
            pointer=f"{pointer}/{position}",
            code="out_of_range",
            detail=f"There is no matched layer in block {index}; the matched layers lie in"
            f" {_blocks_word(len(numbers))} {_ranges(numbers)}.",
            input=index,
        )
        for position, index in enumerate(config.specific_indices or ())
        if index not in known
    ]


def _reason(strategy: LayerSelectionStrategy, config: ModalityConfig, count: int) -> str:
    """The strategy's doing in words, such as `last_n took the last 8 of 30 blocks`."""
    of_all = f"of {count} {_blocks_word(count)}"
    words = {
        LayerSelectionStrategy.ALL: f"took all {count} {_blocks_word(count)}",
        LayerSelectionStrategy.FIRST_N: f"took the first {config.n_layers} {of_all}",
        LayerSelectionStrategy.LAST_N: f"took the last {config.n_layers} {of_all}",
        LayerSelectionStrategy.EVERY_NTH: f"took every {_ordinal(config.step_size or 1)} {of_all}",
        LayerSelectionStrategy.SPECIFIC: f"took the named ones {of_all}",
        LayerSelectionStrategy.SKIP_FIRST_LAST: f"took all but the first and the last {of_all}",
    }
    return f"{strategy} {words[strategy]}"


def _ordinal(number: int) -> str:
    if number == 1:
        return "one"
    teen = 10 < number % 100 < 14
    suffix = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _blocks_word(count: int) -> str:
    return "block" if count == 1 else "blocks"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 5, 8-9` for ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][-1:] = [number] if len(runs[-1]) > 1 else [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(str(number) for number in run) for run in runs) or "none"
