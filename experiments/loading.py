"""A model to write with, from the folder of a stage that trained it or of a published model."""

import dataclasses
import hashlib
import pathlib
import warnings
from typing import Any, cast

import jax
from jax.sharding import Mesh

from distill.checkpoint import read_metadata
from distill.pretrained_tokenizer import PretrainedTokenizer
from distill.tokenizer import load_tokenizer
from experiments.build import build
from experiments.loaded import Loaded
from experiments.quantised_folder import is_quantised, load_quantised
from experiments.training import load_model, model_sha256
from experiments.workdir import read_json
from moe.config import DType, TransformerConfig
from moe.convert import load_pretrained
from moe.errors import InputError
from moe.quantised import Weights
from moe.quantising import quantise
from moe.sharding import MeshConfig, make_mesh, variable_shardings
from moe.transformer import Transformer
from moe.unstacked import relaid, unrolled


def load_model_of(
    checkpoint: str | pathlib.Path, *, mesh: MeshConfig | None = None, dtype: str | None = None
) -> Loaded:
    """Loads a trained stage's model, a published one, or a quantised one.

    See `load_stage`, `load_published` and `experiments.quantised_folder.load_quantised`.

    Raises:
        InputError: as those.
    """
    folder = pathlib.Path(checkpoint).expanduser().absolute()
    if is_quantised(folder):
        return load_quantised(folder, mesh=mesh, dtype=dtype)
    published = (folder / 'config.json').is_file() and any(folder.glob('*.safetensors'))
    return (load_published if published else load_stage)(folder, mesh=mesh, dtype=dtype)


def load_published(
    folder: pathlib.Path, *, mesh: MeshConfig | None = None, dtype: str | None = None
) -> Loaded:
    """Loads a folder of safetensors, with its tokenizer.

    Args:
        folder: with config.json and tokenizer.json.
        mesh: of all devices; None for one of them.
        dtype: to store and compute in; None for bfloat16.

    Raises:
        InputError: as `moe.load_pretrained`, and where the tokenizer cannot be read.
    """
    tokenizer = PretrainedTokenizer(folder)
    devices = make_mesh(mesh or MeshConfig(), None if mesh else jax.devices()[:1])
    kept = cast(DType, dtype or 'bfloat16')
    config, variables = load_pretrained(folder, mesh=devices, dtype=kept)
    model = Transformer(config, devices if devices.size > 1 else None)
    model, variables = unstacked(model, {'routing': {}} | variables, devices)
    digest = hashlib.sha256()
    for file in sorted(folder.glob('*.safetensors')):
        with file.open('rb') as stream:
            digest.update(hashlib.file_digest(stream, 'sha256').digest())
    return Loaded(folder.name, model, variables, tokenizer, digest.hexdigest(), folder)


def load_stage(
    checkpoint: str | pathlib.Path, *, mesh: MeshConfig | None = None, dtype: str | None = None
) -> Loaded:
    """Loads the model of a trained stage, such as runs/quickstart/student.

    The checkpoint says which architecture it holds; no config is needed.

    Args:
        checkpoint: the stage's folder.
        mesh: of all devices; None for one of them.
        dtype: to compute in; None for that of the weights.

    Raises:
        InputError: where the folder holds no trained model of ours, or its tokenizer is missing.
    """
    folder = pathlib.Path(checkpoint).expanduser().absolute()
    if not (folder / 'model').is_dir():
        raise InputError(
            f'--checkpoint must be the folder of a stage that trained a model, such as '
            f'runs/quickstart/student, or a published one (config.json, safetensors); {folder} '
            'is neither.'
        )
    info = read_metadata(folder / 'model')
    stored = next(iter(info.arrays.values()))[0]
    values = info.metadata['identity']['model'] | {
        'dtype': dtype or stored,
        'param_dtype': stored,
    }
    config = build(TransformerConfig, values, f'{folder}: model')
    tokenizer = load_tokenizer(_tokenizer_folder(folder.parent))
    devices = make_mesh(mesh or MeshConfig(), None if mesh else jax.devices()[:1])
    model = Transformer(config, devices if devices.size > 1 else None)
    identity = {'tokenizer': tokenizer.fingerprint}
    variables = load_model(folder / 'model', model, devices, identity)
    model, variables = unstacked(model, variables, devices)
    return Loaded(
        name=f'{folder.parent.name}/{folder.name}',
        model=model,
        variables=variables,
        tokenizer=tokenizer,
        sha256=model_sha256(folder / 'model'),
    )


def with_weights(loaded: Loaded, weights: Weights) -> Loaded:
    """Quantises a model's matrices; its floats are given up.

    Raises:
        InputError: where it is quantised to something else, or a mesh splits what shares a scale.
    """
    if loaded.weights == weights:
        return loaded
    if loaded.weights is not None:
        raise InputError(
            f'{loaded.name} is quantised to {loaded.weights!r} already; received '
            f'--weights={weights}. Leave that out, or load the checkpoint that it was made of.'
        )
    return dataclasses.replace(
        loaded,
        name=f'{loaded.name}/{weights}',
        variables=quantise(loaded.model, loaded.variables, weights),
        sha256=hashlib.sha256(f'{weights} {loaded.sha256}'.encode()).hexdigest(),
        weights=weights,
    )


def unstacked(model: Transformer, variables: Any, mesh: Mesh) -> tuple[Transformer, Any]:
    """Gives each layer arrays of its own: out of a stack, a step would copy all of its experts."""
    source, target = model.config, unrolled(model.config)
    if not source.scan_layers:
        return model, variables
    model = model.clone(config=target)
    shardings = {'routing': {}} | variable_shardings(model, mesh)
    move = jax.jit(
        lambda variables: {k: relaid(source, target, tree) for k, tree in variables.items()},
        out_shardings=shardings,
        donate_argnums=0,
    )
    with warnings.catch_warnings():
        # A layer cannot take the memory of a whole stack; what is in no stack stays where it is.
        warnings.filterwarnings('ignore', 'Some donated buffers were not usable')
        return model, move(variables)


def _tokenizer_folder(workdir: pathlib.Path) -> pathlib.Path:
    """The study's own, or that of the study that its teacher came from."""
    own = workdir / 'tokenizer'
    config = workdir / 'config.json'
    if own.exists() or not config.exists():
        return own
    teacher = read_json(config)['teacher']['checkpoint']
    return own if teacher is None else pathlib.Path(teacher).expanduser().parent / 'tokenizer'
