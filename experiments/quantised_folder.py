"""A quantised model as a folder, which is read without its floats ever having been there.

folder/quantised.json       the architecture, what the matrices are, whence they came
folder/model.safetensors    every array, by its path
folder/tokenizer/           that it was trained with
folder/manifest.json        checksums of it all
"""

import functools
import pathlib
from typing import Any

import jax

from distill.files import whole_directory
from distill.manifest import MANIFEST, damaged_files, manifest_sha256, write_manifest
from distill.tokenizer import load_tokenizer
from experiments.build import build
from experiments.identity import model_identity
from experiments.loaded import Loaded
from experiments.workdir import read_json, write_json
from moe.config import TransformerConfig
from moe.errors import InputError
from moe.quantising import quantise, quantised_shardings
from moe.sharding import MeshConfig, abstract_variables, make_mesh
from moe.transformer import Transformer
from moe.weights.tree_file import load_tree, save_tree

RECORD, ARRAYS = 'quantised.json', 'model.safetensors'


def save_quantised(folder: pathlib.Path, loaded: Loaded) -> None:
    """Writes a model that `experiments.loading.with_weights` quantised.

    Args:
        folder: that is not there yet, or empty; it is made whole or not at all.
        loaded: the model, on the devices of this process.
    """
    config = loaded.model.config
    record = {
        'name': loaded.name,
        'weights': loaded.weights,
        'model': model_identity(config),
        'dtype': config.dtype,
        'param_dtype': config.param_dtype,
        'tokenizer': loaded.tokenizer.fingerprint,
        'made_of': loaded.sha256,
    }
    with whole_directory(folder) as directory:
        save_tree(directory / ARRAYS, loaded.variables)
        loaded.tokenizer.save(directory / 'tokenizer')
        write_json(directory / RECORD, record)
        write_manifest(directory)


def is_quantised(folder: pathlib.Path) -> bool:
    """Whether a folder is one that `save_quantised` writes."""
    return (folder / RECORD).is_file()


def load_quantised(
    folder: pathlib.Path, *, mesh: MeshConfig | None = None, dtype: str | None = None
) -> Loaded:
    """Loads what `save_quantised` wrote.

    Args:
        folder: of the model.
        mesh: of all devices; None for one of them.
        dtype: to compute in; None for that of the model that was quantised.

    Raises:
        InputError: where a file is damaged, or arrays are not those of the architecture: all are
            named; or where the mesh does not divide one.
    """
    complete = (folder / MANIFEST).is_file()
    damage = damaged_files(folder) if complete else [f'{MANIFEST}: missing']
    if damage:
        files = '\n'.join(f'  {file}' for file in damage)
        raise InputError(
            f'{folder} must be a quantised model with every checksum right; damaged are:\n{files}\n'
            'Write it again: python -m experiments.quantise.'
        )
    record: dict[str, Any] = read_json(folder / RECORD)
    dtypes = {'dtype': dtype or record['dtype'], 'param_dtype': record['param_dtype']}
    values = record['model'] | dtypes
    config = build(TransformerConfig, values, f'{folder / RECORD}: model')
    model = Transformer(config, None if mesh is None else make_mesh(mesh))
    tokenizer = load_tokenizer(folder / 'tokenizer')
    if tokenizer.fingerprint != record['tokenizer']:
        raise InputError(f'{folder / "tokenizer"} must be that of the model; it is another.')
    shapes = jax.eval_shape(
        functools.partial(quantise, model, weights=record['weights']),
        {'routing': {}} | abstract_variables(model),
    )
    shardings = None if mesh is None else quantised_shardings(model, record['weights'])
    return Loaded(
        name=record['name'],
        model=model,
        variables=load_tree(folder / ARRAYS, shapes, shardings),
        tokenizer=tokenizer,
        sha256=manifest_sha256(folder),
        published=folder / 'tokenizer' if tokenizer.kind == 'pretrained' else None,
        weights=record['weights'],
    )
