"""Compares variants of one study over several seeds, at equal tokens.

    python -m experiments.sweep --config=configs/upcycle.py --workdir=runs/upcycle

The config holds a study, and what each variant changes in it. Each variant with each seed is a
study in WORKDIR/VARIANT/seed_N; a teacher that several share is trained once, and so is a control.
Runs that are complete are skipped, and one that was cut off goes on where it was. What came out is
in WORKDIR/comparison.json, .md and .png.
"""

import json
import pathlib
import shlex
import sys

import jax
from absl import flags, logging
from ml_collections import config_flags

from distill import distributed
from experiments import cli
from experiments.sweep_config import build_runs
from experiments.sweep_runs import compare, figures, run_all
from moe.errors import InputError

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The sweep: a file that defines get_config().'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of the sweep, made where missing.')
JSON = flags.DEFINE_string('json', None, 'Where to write the figures as JSON rows.')


def main() -> None:
    """Runs what is not complete, and compares."""
    for flag in (CONFIG, WORKDIR):
        if not flag.value:
            raise InputError(f'--{flag.name}=PATH is required. See --help.')
    workdir = pathlib.Path(WORKDIR.value or '').expanduser().absolute()
    logging.set_verbosity(logging.WARNING)
    distributed.initialize()
    runs = build_runs(CONFIG.value)
    # The runs compile the same programs, one after the other.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update('jax_compilation_cache_dir', str(workdir / 'compiled'))
    command = shlex.join(['python', '-m', 'experiments.sweep', *sys.argv[1:]])
    run_all(runs, workdir, command)
    if distributed.is_writer():
        comparison = compare(runs, workdir, CONFIG.value.baseline, command)
        if JSON.value is not None:
            rows = figures(comparison)
            pathlib.Path(JSON.value).write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
    cli.run(main)
