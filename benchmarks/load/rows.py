"""Tables as a service has them after a long time: many jobs of many teams, most of them ended.

Rows are made by the database itself, from one template of a job, and spread by the row's number:
of 1,000 jobs 15 are queued, 3 run, 2 are being paused or cancelled, 5 are paused, 5 wait for their
start, 800 succeeded, 100 failed and 70 were cancelled.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from sqlalchemy import Engine, make_url

from grit_core.config.model_configs import Modality
from grit_core.inventory import LayerRecord, ModelInventory
from grit_core.job_spec import resolve_job
from store import base_models, keys, migrate, workers
from store.database import create_engine_from, transaction
from store.ids import new_id
from store.keys import Scope
from store.models import Dataset, DatasetStatus
from store.settings import Settings

NUM_TEAMS: Final = 50
MODELS: Final = ("smolvlm-256m", "smolvlm-500m", "tiny-a", "tiny-b")
NUM_DATASET_ROWS: Final = 2000
SHARES: Final = {
    "queued": 15,
    "running": 18,
    "pausing": 19,
    "cancelling": 20,
    "paused": 25,
    "created": 30,
    "succeeded": 830,
    "failed": 930,
    "cancelled": 1000,
}
"""Status of a job by its place among 1,000: below the first bound that is above it."""


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A database with rows, and who may ask for them."""

    url: str
    num_jobs: int
    tokens: tuple[str, ...]
    """A key with all that a user may do, of each team."""
    datasets: tuple[str, ...]
    """A dataset that is ready, of each team."""

    def job_id(self, number: int) -> str:
        """The id of the job that was made as the `number`-th, from 1."""
        return job_id(number)

    def token_of(self, number: int) -> str:
        """The key of that job's team."""
        return self.tokens[number % NUM_TEAMS]


def job_id(number: int) -> str:
    """An id that sorts by its number, and before all that `store.ids` makes now."""
    return f"job_01{number:010x}{number * 2654435761 % 2**56:014x}"


def status_of(number: int) -> str:
    """The status of the job of a number."""
    place = (number // NUM_TEAMS * 7919 + number) % 1000
    return next(status for status, bound in SHARES.items() if place < bound)


def inventory() -> ModelInventory:
    """A model of SmolVLM-256M's shape: 12 vision blocks, 30 text blocks and a connector."""
    vision = [("self_attn.q_proj", 768, 768), ("self_attn.k_proj", 768, 768)]
    vision += [("self_attn.v_proj", 768, 768), ("self_attn.out_proj", 768, 768)]
    vision += [("mlp.fc1", 768, 3072), ("mlp.fc2", 3072, 768)]
    text = [("self_attn.q_proj", 576, 576), ("self_attn.k_proj", 576, 192)]
    text += [("self_attn.v_proj", 576, 192), ("self_attn.o_proj", 576, 576)]
    text += [("mlp.gate_proj", 576, 1536), ("mlp.up_proj", 576, 1536), ("mlp.down_proj", 1536, 576)]
    towers = [
        ("vision_model.encoder", Modality.VISION, 12, vision),
        ("text_model", Modality.TEXT, 30, text),
    ]
    layers = [
        LayerRecord(
            name=f"model.{tower}.layers.{block}.{name}",
            modality=modality,
            block=block,
            in_features=width,
            out_features=height,
        )
        for tower, modality, num_blocks, linear in towers
        for block in range(num_blocks)
        for name, width, height in linear
    ]
    connector = LayerRecord(
        name="model.connector.modality_projection.proj",
        modality=Modality.CROSS_MODAL,
        block=None,
        in_features=12288,
        out_features=576,
    )
    return ModelInventory(
        model_type="idefics3",
        architecture="Idefics3ForConditionalGeneration",
        layers=(*layers, connector),
        total_parameters=256_484_928,
        family="smolvlm",
        hidden_size=576,
        num_blocks=30,
        vocabulary_size=49_280,
    )


def job_body(model: str, dataset: str, **fields: Any) -> dict[str, Any]:
    """A request such as users send: attention of the last four text blocks."""
    block = {"layer_patterns": ["model.text_model.layers.*.self_attn.*_proj"]}
    config = {
        "model_name": model,
        "model_type": "idefics3",
        "text": {**block, "strategy": "last_n", "n_layers": 4, "fisher_approximation": "kfac"},
    }
    return {
        "model": model,
        "dataset": dataset,
        "config": config,
        "training": {"epochs": 3, "learning_rate": 0.002, "batch_size": 8},
        "device": "cpu",
        "name": "nightly",
        "metadata": {"sweep": "s-1", "seed": "3"},
        **fields,
    }


def fill(url: str, *, num_jobs: int) -> Filled:
    """Make the tables in an empty database, and fill them."""
    engine = create_engine_from(Settings(database_url=url, statement_timeout_seconds=600))
    migrate.upgrade(engine)
    tokens, datasets = _parties(engine)
    engine.dispose()
    address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as connection:
        # The rows refer only to what is there; checking a million of them takes long.
        connection.execute("SET session_replication_role = replica")
        connection.execute(_JOBS, {**_template(), "count": num_jobs})
        connection.execute(_EVENTS)
        connection.execute("VACUUM ANALYZE")
    return Filled(url=url, num_jobs=num_jobs, tokens=tokens, datasets=datasets)


def _parties(engine: Engine) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Models, teams with a key and a dataset, and a worker of each queue."""
    found, tokens, datasets = inventory(), [], []
    with transaction(engine) as session:
        for model in MODELS:
            base_models.register(session, id=model, source=f"/models/{model}")
            base_models.save_inventory(
                session, id=model, inventory=found.to_json(), inventory_hash=found.hash
            )
        for number in range(NUM_TEAMS):
            team = f"team-{number}"
            scopes = (Scope.READ, Scope.WRITE, Scope.INFER)
            tokens.append(keys.create_key(session, team=team, name="load", scopes=scopes)[1])
            dataset = Dataset(
                id=new_id("ds"),
                team=team,
                status=DatasetStatus.READY,
                object_key=f"datasets/{number}",
                num_rows=NUM_DATASET_ROWS,
                size_bytes=4_000_000,
            )
            session.add(dataset)
            datasets.append(dataset.id)
        for queue in ("cpu", "cuda"):
            workers.register_worker(
                session, hostname="load", process_id=1, queues=[queue], device=queue
            )
    return tuple(tokens), tuple(datasets)


def _template() -> Mapping[str, Any]:
    body = job_body(MODELS[0], "ds")
    resolved = resolve_job(body, inventory(), num_rows=NUM_DATASET_ROWS, device="cpu")
    assert resolved is not None
    progress = {"step": 640, "total_steps": 750, "epoch": 2.5, "percent": 85.3, "train_loss": 0.41}
    progress |= {"learning_rate": 0.0011, "tokens_per_second": 912.4, "elapsed_seconds": 803.1}
    result = {"adapter": "adp_01", "final_loss": 0.38, "trainable_parameters": 147_456}
    error = {"code": "worker_lost", "category": "system", "message": "gone", "retryable": True}
    texts = {
        "request": body,
        "config": resolved.config_json(),
        "training": resolved.training_json(),
        "plan": resolved.plan.to_json(),
        "progress": progress,
        "result": result,
        "error": error,
    }
    return {
        **{name: json.dumps(value) for name, value in texts.items()},
        "plan_hash": resolved.plan.plan_hash,
        "models": list(MODELS),
    }


_STATUS: Final = " ".join(
    f"WHEN (i / 50 * 7919 + i) %% 1000 < {bound} THEN '{status}'"
    for status, bound in SHARES.items()
)
_JOBS: Final = f"""
INSERT INTO jobs (
  id, team, status, phase, kind, name, metadata, model, dataset_id, request, config, training, plan,
  plan_hash, device, queue, priority, attempt, charged_attempts, max_attempts, infra_failures,
  worker_id, lease_expires_at, last_rung_at, progress, result, error, last_sequence, version,
  created_at, queued_at, started_at, finished_at, updated_at
)
SELECT
  'job_01' || lpad(to_hex(i), 10, '0')
    || lpad(to_hex(i * 2654435761 %% 72057594037927936), 14, '0'),
  'team-' || i %% 50, drawn.stage,
  CASE WHEN drawn.stage = 'running' THEN 'training' END, 'training',
  'nightly-' || i, jsonb_build_object('sweep', 's-' || i / 100, 'seed', (i / 50 %% 7)::text),
  (%(models)s::text[])[1 + i / 50 %% 4], first.id, %(request)s, %(config)s, %(training)s, %(plan)s,
  %(plan_hash)s, device, device, i / 50 %% 5 - 2,
  CASE WHEN drawn.stage IN ('created', 'queued') THEN 0 ELSE 1 END,
  CASE WHEN drawn.stage IN ('created', 'queued') THEN 0 ELSE 1 END, 3, 0,
  CASE WHEN active THEN 'wrk_load' END, CASE WHEN active THEN now() + interval '1 day' END,
  CASE WHEN drawn.stage = 'queued' THEN now() END,
  CASE WHEN drawn.stage NOT IN ('created', 'queued') THEN %(progress)s::jsonb END,
  CASE WHEN drawn.stage = 'succeeded' THEN %(result)s::jsonb END,
  CASE WHEN drawn.stage = 'failed' THEN %(error)s::jsonb END, 3, 5, born, born,
  CASE WHEN drawn.stage NOT IN ('created', 'queued') THEN born + interval '1 minute' END,
  CASE WHEN drawn.stage IN ('succeeded', 'failed', 'cancelled')
    THEN born + interval '20 minutes' END,
  born
FROM (
  SELECT i, CASE {_STATUS} END AS stage, (i / 50 * 7919 + i) %% 1000 BETWEEN 15 AND 19 AS active,
    CASE WHEN i %% 3 = 0 THEN 'cuda' ELSE 'cpu' END AS device,
    now() - (%(count)s - i) * interval '30 seconds' AS born
  FROM generate_series(1, %(count)s::bigint) AS i
) AS drawn
JOIN datasets AS first ON first.team = 'team-' || i %% 50
"""
_EVENTS: Final = """
INSERT INTO events (job_id, sequence, type, payload, created_at)
SELECT id, sequence, 'status_changed', '{"from": null, "to": "queued", "reason": null}', created_at
FROM jobs, generate_series(1, 3) AS sequence
"""
