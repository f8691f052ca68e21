# syntax=docker/dockerfile:1
# Two images from one file. `api` holds no torch and no transformers: the front door starts in under a
# second and cannot load a model by accident. `worker` holds both.
#
#   docker build --target api    -t grit-api .
#   docker build --target worker -t grit-worker .
#   docker build --target worker --build-arg TORCH="torch==2.13.0 --index-url <index of your CUDA build>" -t grit-worker .

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    GRIT_HOME=/var/lib/grit
RUN groupadd --system --gid 10001 grit \
 && useradd --system --uid 10001 --gid grit --home-dir /var/lib/grit --create-home grit
WORKDIR /srv/grit

FROM base AS api
COPY requirements/api.lock requirements/api.lock
RUN pip install --no-deps --require-hashes -r requirements/api.lock
COPY pyproject.toml README.md LICENSE ./
COPY grit_core grit_core
COPY store store
COPY migrations migrations
COPY api api
# The build fails where the promise does: importing the API must load no torch.
RUN python -c "import sys, api.app; assert not {'torch', 'transformers', 'peft', 'worker'} & set(sys.modules)"
USER grit
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["python", "-m", "api", "--host", "0.0.0.0"]

FROM base AS worker
# Idle OpenMP threads sleep instead of spinning: two torch processes on few cores starve each other otherwise.
ENV OMP_WAIT_POLICY=PASSIVE
ARG TORCH="torch==2.13.0"
RUN pip install ${TORCH}
COPY requirements/worker.lock requirements/worker.lock
RUN pip install --no-deps --require-hashes -r requirements/worker.lock
COPY pyproject.toml README.md LICENSE ./
COPY grit_core grit_core
COPY store store
COPY migrations migrations
COPY worker worker
# What the files of some model families need, and the lock must hold.
RUN python -c "import google.protobuf, num2words, sentencepiece"
USER grit
# One worker per device: `cpu`, `cuda` or `mps`; the inference worker listens on `infer.<device>`.
CMD ["python", "-m", "celery", "-A", "worker.app", "worker", "--queues", "cpu", "--pool", "solo", "--without-gossip", "--without-mingle"]
