"""Chats that the assistant is to answer: rows without a turn to learn, but with calls of tools."""

from dataclasses import replace
from typing import Any, Final

from grit_core.json_text import pointer_of
from grit_core.records.chat import Message, Role
from grit_core.records.faults import Path, RowFault
from grit_core.records.image_files import no_images
from grit_core.records.row_reader import RowReader
from grit_core.tools.definitions import ToolCall

_TOOL_FIELDS: Final = ("tool_calls", "tool_call_id")


class PromptReader(RowReader):
    """Reads one chat."""

    def __init__(self) -> None:
        """Begin."""
        super().__init__(line=1, resolve_image=no_images, needs_answer=False)

    def _message(self, value: Any, path: Path) -> Message | None:
        """Return a message with its calls, or the id of the call that it answers."""
        if not isinstance(value, dict):
            return super()._message(value, path)
        plain = {key: item for key, item in value.items() if key not in _TOOL_FIELDS}
        message = super()._message(plain, path)
        if message is None:
            return None
        calls = self._calls(value.get("tool_calls") or [], (*path, "tool_calls"))
        answered = str(value.get("tool_call_id") or "")
        return replace(message, tool_calls=calls, tool_call_id=answered)

    def _role(self, value: Any, path: Path) -> Role | None:
        return Role.TOOL if value == Role.TOOL else super()._role(value, path)

    def _calls(self, values: Any, path: Path) -> tuple[ToolCall, ...]:
        calls = []
        for index, value in enumerate(values):
            try:
                calls.append(ToolCall(**value))
            except TypeError:
                detail = "A call has a name, arguments and an id."
                place = pointer_of((*path, index))
                self.faults.append(RowFault(self.line, place, "row_invalid", detail))
        return tuple(calls)
