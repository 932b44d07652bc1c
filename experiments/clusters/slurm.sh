#!/usr/bin/env bash
# One process a node, each with all of its node's accelerators:
#
#     sbatch --nodes=4 experiments/clusters/slurm.sh
#     CONFIG=configs/STUDY.py WORKDIR=/shared/runs/STUDY sbatch --nodes=4 experiments/clusters/slurm.sh --seed=1
#
# Submit from the root of the checkout, which every node must see, as it must see WORKDIR. jax finds
# the coordinator and the ranks in SLURM's variables. What sbatch is told on its command line goes
# before what stands here; what follows the script goes to the launcher.
#SBATCH --job-name=fractional
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# SIGTERM two minutes ahead of the end, to the launchers: they save a checkpoint and exit with 0.
#SBATCH --signal=TERM@120
# A preempted job goes back into the queue, and then goes on from its newest checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
CONFIG=${CONFIG:-configs/quickstart.py}
WORKDIR=${WORKDIR:-runs/quickstart}

# In SLURM jax takes one accelerator a process unless it is told which: all of the node's.
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
fi

# --cpu-bind=none: a node's one task may use all of its cores. --kill-on-bad-exit: a dead process would
# leave the others waiting for it in a collective.
exec srun --cpu-bind=none --kill-on-bad-exit=1 \
    "$PYTHON" -m experiments.launch --config="$CONFIG" --workdir="$WORKDIR" "$@"
