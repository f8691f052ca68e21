"""The JSON of a job, from a mapping, a file, or the library's own configuration objects."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_client.errors import InvalidInput
from grit_core.errors import Fault
from grit_core.json_text import InvalidJson, decode

if TYPE_CHECKING:
    from grit_core.config.model_configs import ModelGRITConfig
    from grit_core.config.training import TrainingConfig

MAX_SPEC_BYTES = 32 * 1024**2
_YAML = {".yaml", ".yml"}


def job_body(
    spec: Mapping[str, Any],
    *,
    config: "ModelGRITConfig | None" = None,
    training: "TrainingConfig | None" = None,
) -> dict[str, Any]:
    """Return the body of `POST /jobs`.

    The objects that train on a laptop are accepted as they are, beside the mapping or inside it.
    """
    body = dict(spec)
    if config is not None:
        body["config"] = config
    if training is not None:
        body["training"] = training
    return {name: _plain(value) for name, value in body.items()}


def read_spec(path: Path) -> dict[str, Any]:
    """Read a job's JSON from a file, as strictly as the service would.

    Raises:
        InvalidInput: If it cannot be read or is no JSON object; the fault says where.
    """
    path = path.expanduser()
    try:
        if path.stat().st_size > MAX_SPEC_BYTES:
            raise InvalidInput(f"{path} is larger than {MAX_SPEC_BYTES} bytes; is it a job's JSON?")
        value = decode(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"The file {str(path)!r} cannot be read: {error.strerror}.") from None
    except InvalidJson as error:
        fault = Fault(pointer=error.pointer, code=error.code, detail=error.detail)
        hint = " Jobs are written in JSON, not in YAML." if path.suffix in _YAML else ""
        raise InvalidInput(f"{path} is not a job's JSON.{hint}", faults=(fault,)) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InvalidInput(f"{path} holds a JSON {kind}; a job is an object, such as {{...}}.")
    return value


def _plain(value: Any) -> Any:
    # Strategies are text enums, so what comes out is JSON already.
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value
