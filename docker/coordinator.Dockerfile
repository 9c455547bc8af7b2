# syntax=docker/dockerfile:1
# The image of the coordinator, of the server, of Ray's head, and of what needs no GPU; there is no
# CUDA in it.
# From the repository's root: docker build -f docker/coordinator.Dockerfile -t evomerge .

# Ray wants the same minor version of Python everywhere: that of the image that workers are made of.
# To pin the bytes, give a digest: --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Where torch has builds without CUDA; PyPI's bring gigabytes of it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/evomerge \
    && /opt/evomerge/bin/pip install --no-deps --index-url "${TORCH_INDEX}" \
        --constraint constraints.txt torch
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_CONSTRAINT=constraints.txt \
    /opt/evomerge/bin/pip install '.[lm-eval,postgres,ray,serve,tasks]'

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="evomerge" \
      org.opencontainers.image.description="Coordinator and server of searches, without CUDA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# bubblewrap runs the programs that models write; KubeRay's probes call wget. Versions are those of
# the Debian release that the image above is pinned to.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes bubblewrap wget \
    && rm -rf /var/lib/apt/lists/*

# A number that no base image has taken. Volumes take their owner from the folders made here.
ARG UID=10001
RUN groupadd --gid "${UID}" evomerge \
    && useradd --uid "${UID}" --gid "${UID}" --create-home evomerge \
    && install --directory --owner=evomerge --group=evomerge --mode=0700 \
        /home/evomerge/.cache /home/evomerge/tmp /home/evomerge/work \
    && install --directory --owner=evomerge --group=evomerge /exports

COPY --from=build /opt/evomerge /opt/evomerge

# Where anything is written: all under the home. TMPDIR holds the files by which a coordinator shows
# that it lives, RAY_TMPDIR Ray's sockets and logs.
ENV PATH=/opt/evomerge/bin:$PATH \
    HOME=/home/evomerge \
    XDG_CACHE_HOME=/home/evomerge/.cache \
    HF_HOME=/home/evomerge/.cache/huggingface \
    EVOMERGE_CACHE=/home/evomerge/.cache/evomerge \
    TMPDIR=/home/evomerge/tmp \
    RAY_TMPDIR=/home/evomerge/tmp \
    RAY_USAGE_STATS_ENABLED=0 \
    PYTHONUNBUFFERED=1

USER ${UID}:${UID}
WORKDIR /home/evomerge/work
# No HEALTHCHECK: a coordinator ends, and its exit code says how; the services that do not end have
# theirs in compose.yaml.
ENTRYPOINT ["evomerge"]
CMD ["--help"]
