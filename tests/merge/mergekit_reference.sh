#!/bin/sh
# Makes .venv-mergekit: the mergekit that test_mergekit.py compares evomerge with. PYTHON is
# evomerge's own interpreter. mergekit is LGPL and has many requirements, so it lives apart.
set -eu
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
torch=$("$python" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')
"$python" -m venv .venv-mergekit
# The same torch, so that results can be bit-equal; first, so that mergekit takes what is there.
.venv-mergekit/bin/pip install --quiet "torch==$torch"
.venv-mergekit/bin/pip install --quiet mergekit==0.1.5
