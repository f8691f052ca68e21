"""A plan, as a person reads it: every layer with its numbers and the reason it was picked."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from grit_client.commands.tables import facts, size, table
from grit_client.terminal_text import printable


def render_plan(plan: Mapping[str, Any]) -> RenderableType:
    """The layers under the reason they were picked for, then the totals and warnings."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for layer in plan["layers"]:
        groups.setdefault((layer["modality"], layer["reason"]), []).append(layer)
    parts: list[RenderableType] = []
    for (modality, reason), layers in groups.items():
        parts += [
            Text.assemble((modality, "bold cyan"), f": {printable(reason)}"),
            _layers(layers),
        ]
    estimate = plan.get("estimate") or {}
    totals = facts({
        "model": plan.get("model"),
        "device": _with_reason(plan.get("device"), plan.get("device_reason")),
        "layers": len(plan["layers"]),
        "trainable parameters": plan["trainable_parameters"],
        "steps": estimate.get("total_steps"),
        "memory": size(estimate.get("memory_bytes")),
        "left out": len(plan.get("dropped") or []) or None,
        "plan hash": plan["plan_hash"],
    })
    warnings = [
        Text(printable(f"warning: {text}"), style="yellow") for text in plan.get("warnings") or []
    ]
    return Group(*parts, totals, *warnings)


def _layers(layers: Sequence[Mapping[str, Any]]) -> RenderableType:
    columns = ["layer", "block", "size", "rank", "alpha", "parameters"]
    rows = [
        [
            layer["name"],
            layer["block"],
            f"{layer['in_features']} x {layer['out_features']}",
            layer["rank"],
            layer["alpha"],
            layer["parameters"],
        ]
        for layer in layers
    ]
    return table(columns, rows)


def _with_reason(value: Any, reason: Any) -> str | None:
    if value is None:
        return None
    return f"{value} ({reason})" if reason else str(value)
