"""`Family`: where the parts of a model lie, and which of their layers adapt by default."""

from collections.abc import Mapping
from dataclasses import dataclass

from grit_core.config.model_configs import Modality


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a model lie, and which of their layers adapt by default."""

    name: str
    title: str
    """For people."""
    model_types: tuple[str, ...]
    """As in `config.json`."""
    roots: Mapping[str, Modality]
    """Submodule names; the longest that a layer's name begins with decides its modality."""
    queries: Mapping[Modality, str]
    """One pattern for each modality: where an attention's queries are made, or the connector."""
    values: Mapping[Modality, str]
    """One pattern for each modality: where an attention's values are made, or the connector."""
    mixers: tuple[str, ...] = ()
    """Patterns of the language model's blocks that mix tokens otherwise than by attention: where
    a state-space, convolution or linear-attention layer reads its input."""
    balanced_blocks: int = 8
    """Text blocks of the balanced preset; fewer where a block has more than two such layers."""
    fusion_part: str | None = None
    """Part of a name that tells a language model's attention to images."""

    def default_patterns(self, modality: Modality) -> list[str]:
        """What an empty list of patterns stands for; empty when the family has no such part."""
        both = (self.queries.get(modality), self.values.get(modality))
        mixers = self.mixers if modality == Modality.TEXT else ()
        return list(dict.fromkeys(pattern for pattern in (*both, *mixers) if pattern is not None))

    def modality_of(self, name: str) -> Modality | None:
        """The part that a layer lies in."""
        inside = [root for root in self.roots if name == root or name.startswith(f"{root}.")]
        if not inside:
            return None
        modality = self.roots[max(inside, key=len)]
        fuses = modality == Modality.TEXT and self.fusion_part in name.split(".")
        return Modality.FUSION if fuses else modality
