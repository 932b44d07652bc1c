"""Runs a study.

    python -m experiments.launch --config=configs/quickstart.py --workdir=runs/quickstart

Every key of the config can be overridden: --config.student.model.num_layers=3. Stages that are
complete in the workdir are skipped, and one that was cut off goes on where it was.
"""

import pathlib
import shlex
import sys

from absl import flags, logging
from ml_collections import config_flags

from distill import distributed
from experiments import cli
from experiments.context import Context
from experiments.signals import StopSignal
from experiments.stages import USUAL_STAGES, require_stages, run_stages

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The study: a file that defines get_config().'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of the study, made where it is missing.')
STAGE_NAMES = flags.DEFINE_list(
    'stages', list(USUAL_STAGES), "The stages to run, in their own order; 'export' is one more."
)
JSON = flags.DEFINE_string('json', None, "Where to write the report's figures as JSON rows.")
COORDINATOR = flags.DEFINE_string(
    'coordinator_address', None, "'host:port' of process 0; found by itself on SLURM, TPU and GKE."
)
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'With --coordinator_address: in all.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'With --coordinator_address: of this one.')


def main() -> None:
    """Runs the stages that were asked for."""
    config, workdir = cli.required(CONFIG), cli.required(WORKDIR)
    require_stages(tuple(STAGE_NAMES.value))
    logging.set_verbosity(logging.WARNING)
    distributed.initialize(
        coordinator_address=COORDINATOR.value,
        num_processes=NUM_PROCESSES.value,
        process_id=PROCESS_ID.value,
    )
    context = Context(
        config,
        workdir,
        command=shlex.join(['python', '-m', 'experiments.launch', *sys.argv[1:]]),
        stop=StopSignal(),
        json_path=None if JSON.value is None else pathlib.Path(JSON.value),
    )
    run_stages(context, tuple(STAGE_NAMES.value))


if __name__ == '__main__':
    cli.run(main)
