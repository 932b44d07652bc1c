"""Converts a published model's folder to a checkpoint of ours, or a stage's checkpoint to a folder.

    python -m experiments.convert --source=models/Qwen3-0.6B --out=runs/qwen/teacher
    python -m experiments.convert --source=runs/quickstart/student --out=models/student

Which way is found from what --source holds: config.json with a model_type, or the `model` folder
of a stage. A checkpoint that is made of a published model is one for config.teacher.source
'checkpoint'; its tokenizer goes into the folder beside it, where studies look for it.
"""

import pathlib
import tempfile
from typing import Any

from absl import flags, logging

from distill.checkpoint import CheckpointManager, read_metadata
from distill.pretrained_tokenizer import PretrainedTokenizer, write_pretrained
from distill.tokenizer import load_tokenizer
from experiments import cli
from experiments.build import build
from experiments.context import require_room
from experiments.identity import model_identity
from experiments.seen import record_seen
from experiments.training import load_model
from moe.config import TransformerConfig
from moe.convert import family_of, load_pretrained, save_pretrained
from moe.errors import InputError
from moe.sharding import MeshConfig, make_mesh
from moe.transformer import Transformer

SOURCE = flags.DEFINE_string('source', None, "A published model's folder, or that of a stage.")
OUT = flags.DEFINE_string('out', None, 'The folder to write; it must not be there, or be empty.')
DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'], 'Of the parameters that are written.'
)
CONTEXT_LENGTH = flags.DEFINE_integer(
    'context_length', 4096, 'Tokens of the longest text, for servers; into a published folder only.'
)


def main() -> None:
    """Converts, and says what was written."""
    if SOURCE.value is None or OUT.value is None:
        raise InputError('--source=FOLDER and --out=FOLDER are required. See --help.')
    logging.set_verbosity(logging.WARNING)
    source, out = (pathlib.Path(path).expanduser() for path in (SOURCE.value, OUT.value))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f'--out must be an empty folder or none; {out} holds something already.')
    if (source / 'config.json').is_file():
        to_checkpoint(source, out)
    elif (source / 'model').is_dir():
        to_folder(source, out)
    else:
        raise InputError(
            f"--source must be a published model's folder, with config.json, or a stage's, with a "
            f'folder `model`; {source} is neither.'
        )
    print(f'Written: {out}')


def to_checkpoint(source: pathlib.Path, out: pathlib.Path) -> None:
    """Writes a published model as the stage of a study would have left it."""
    dtype: Any = DTYPE.value
    config, variables = load_pretrained(source, mesh=make_mesh(MeshConfig(data=-1)), dtype=dtype)
    tokenizer = PretrainedTokenizer(source)
    require_room(tokenizer.vocab_size, config.vocab_size, str(source))
    beside = out.parent / 'tokenizer'
    if not beside.exists():
        tokenizer.save(beside)
    elif load_tokenizer(beside).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f'{beside} must be the tokenizer of this model; it is another. Choose an --out in a '
            'folder of its own.'
        )
    identity = {'model': model_identity(config), 'tokenizer': tokenizer.fingerprint}
    manager = CheckpointManager(out / 'model', keep_latest=1)
    try:
        manager.save(0, {'routing': {}} | variables, data_state={}, metadata={'identity': identity})
    finally:
        manager.close()
    # What it was trained on is not known: nothing that is held out can be refused.
    record_seen(out, [])


def to_folder(source: pathlib.Path, out: pathlib.Path) -> None:
    """Writes a stage's model as others load it."""
    saved = read_metadata(source / 'model')
    identity = saved.metadata['identity']
    dtypes = [dtype for name, (dtype, _) in saved.arrays.items() if name.startswith('params/')]
    config = checkpoint_config(identity['model'], dtypes[0])
    family_of(config)
    mesh = make_mesh(MeshConfig(data=-1))
    variables = load_model(source / 'model', Transformer(config), mesh, identity)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = pathlib.Path(temporary, 'tokenizer')
        write_pretrained(load_tokenizer(source.parent / 'tokenizer'), tokenizer)
        save_pretrained(
            out, config, variables, tokenizer=tokenizer, context_length=CONTEXT_LENGTH.value
        )


def checkpoint_config(values: dict[str, Any], dtype: str) -> TransformerConfig:
    """Rebuilds the config of a checkpoint from what the checkpoint says of it."""
    dtypes = {'dtype': dtype, 'param_dtype': dtype}
    return build(TransformerConfig, values | dtypes, f'the checkpoint {SOURCE.value}')


if __name__ == '__main__':
    cli.run(main)
