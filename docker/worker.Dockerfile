# syntax=docker/dockerfile:1
# The image of workers on GPUs, and of exports that need one: vLLM's, and evomerge on top of it.
# From the repository's root: docker build -f docker/worker.Dockerfile -t evomerge-worker .

ARG PYTHON_IMAGE=python:3.12-slim-bookworm
# By its tag: no digest was at hand to be checked. To pin the bytes, give one:
# --build-arg VLLM_IMAGE=vllm/vllm-openai:v0.32.0@sha256:...
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_CONSTRAINT=constraints.txt pip wheel --no-deps --wheel-dir /wheels .

FROM ${VLLM_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="evomerge-worker" \
      org.opencontainers.image.description="Worker of evomerge on GPUs, with vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER 0:0
# See coordinator.Dockerfile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes bubblewrap wget \
    && rm -rf /var/lib/apt/lists/*
ARG UID=10001
RUN groupadd --gid "${UID}" evomerge \
    && useradd --uid "${UID}" --gid "${UID}" --create-home evomerge \
    && install --directory --owner=evomerge --group=evomerge --mode=0700 \
        /home/evomerge/.cache /home/evomerge/tmp /home/evomerge/work \
    && install --directory --owner=evomerge --group=evomerge /exports

# An environment over the image's own, whose torch and vLLM it sees and leaves as they are; pip is
# the image's, since its Python may come without the means to install another. The build stops where
# the image has another torch or vLLM than constraints.txt, or another Python than the coordinator.
ARG PYTHON_VERSION=3.12
RUN --mount=type=bind,from=build,source=/source/constraints.txt,target=/constraints.txt \
    --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip --system-site-packages /opt/evomerge \
    && wheel=$(find /wheels -name 'evomerge-*.whl') \
    && python3 -m pip --python /opt/evomerge/bin/python install \
        --constraint /constraints.txt "${wheel}[lm-eval,postgres,ray,tasks]" \
    && test -d "/opt/evomerge/lib/python${PYTHON_VERSION}" \
    && test -z "$(find /opt/evomerge/lib -maxdepth 3 '(' -name torch -o -name vllm ')')"

ENV PATH=/opt/evomerge/bin:$PATH \
    HOME=/home/evomerge \
    XDG_CACHE_HOME=/home/evomerge/.cache \
    HF_HOME=/home/evomerge/.cache/huggingface \
    EVOMERGE_CACHE=/home/evomerge/.cache/evomerge \
    TMPDIR=/home/evomerge/tmp \
    RAY_TMPDIR=/home/evomerge/tmp \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONUNBUFFERED=1

USER ${UID}:${UID}
WORKDIR /home/evomerge/work
# In place of the base image's, which starts vLLM's server.
ENTRYPOINT ["evomerge"]
CMD ["--help"]
