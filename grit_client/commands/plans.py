"""A plan, as a person reads it: every layer with its numbers and the reason it was picked."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from grit_client.commands.tables import facts, size, table


def render_plan(plan: Mapping[str, Any]) -> RenderableType:
    """The layers as a table, then the totals and warnings."""
    layers = table(
        ["layer", "modality", "block", "rank", "alpha", "parameters", "reason"],
        [
            [
                layer["name"], layer["modality"], layer["block"], layer["rank"],
                layer["alpha"], layer["parameters"], layer["reason"],
            ]
            for layer in plan["layers"]
        ],
    )  # fmt: skip
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
    warnings = [Text(f"warning: {text}", style="yellow") for text in plan.get("warnings") or []]
    return Group(layers, totals, *warnings)


def _with_reason(value: Any, reason: Any) -> str | None:
    if value is None:
        return None
    return f"{value} ({reason})" if reason else str(value)
