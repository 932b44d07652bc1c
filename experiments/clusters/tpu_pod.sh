#!/usr/bin/env bash
# Runs a study on every worker of a Cloud TPU slice at once:
#
#     TPU=my-slice ZONE=us-central2-b REPOSITORY=https://... WORKDIR=/mnt/shared/runs/STUDY \
#         experiments/clusters/tpu_pod.sh --config.mesh.fsdp=-1 --config.mesh.data=1
#
# TPU, ZONE: of a slice that is up.    REPOSITORY, REF: git address and commit that the workers check out.
# CONFIG: the study.                   WORKDIR: on a disk that every worker has mounted at the same path.
# What follows the script goes to the launcher. jax finds the other workers through the TPU's metadata.
set -euo pipefail

: "${TPU:?the name of the slice}" "${ZONE:?its zone}" "${REPOSITORY:?a git address}"
: "${WORKDIR:?a path on a disk that every worker has mounted}"
REF=${REF:-HEAD}
CONFIG=${CONFIG:-configs/quickstart.py}

# Quoted here for the shells there: %q keeps spaces and stars as they are.
launch=$(printf '%q ' .venv/bin/python -m experiments.launch \
    "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
repository=$(printf '%q' "$REPOSITORY")
ref=$(printf '%q' "$REF")

# Every worker runs the same program on the same commit: a collective waits for all of them.
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
set -euo pipefail
test -d fractional || git clone -q $repository fractional
cd fractional
git fetch -q origin $ref
git checkout -q --detach FETCH_HEAD
test -d .venv || python3 -m venv .venv
.venv/bin/pip install -q -e '.[tpu]'
exec $launch"
