"""Writes a model with its matrices quantised, as a folder that is a checkpoint for writing.

    python -m experiments.quantise --checkpoint=runs/quickstart/student --weights=int8 \\
        --out=runs/quickstart/student-int8
    python -m experiments.serve --checkpoint=runs/quickstart/student-int8

The checkpoint may be a trained stage, the stage `quantise` among them, or a published model. What
each kind of weights is, moe.quantised says.
"""

import pathlib

from absl import flags, logging

from experiments import cli
from experiments.model_flags import CHECKPOINT, WEIGHTS, loaded_model
from experiments.quantised_folder import save_quantised
from moe.errors import InputError

OUT = flags.DEFINE_string('out', None, 'The folder to write; it must not be there, or be empty.')


def main() -> None:
    """Quantises, and says what was written."""
    logging.set_verbosity(logging.WARNING)
    checkpoint, out = cli.required(CHECKPOINT), pathlib.Path(cli.required(OUT)).expanduser()
    if WEIGHTS.value is None:
        raise InputError('--weights=KIND is required: what to quantise to. See --help.')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f'--out must be an empty folder or none; {out} holds something already.')
    save_quantised(out, loaded_model(checkpoint))
    size = sum(file.stat().st_size for file in out.rglob('*') if file.is_file())
    print(f'Written: {out}, {size:,} bytes')


if __name__ == '__main__':
    cli.run(main)
