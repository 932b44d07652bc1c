"""Published checkpoints in and out: folders that `transformers` and its kin read and write.

`moe.families` says, family by family, how names, axes and config fields correspond; `moe.weights`
moves the tensors. Nothing here knows one family from another.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import DType, TransformerConfig
from moe.errors import InputError
from moe.families import FAMILIES, READ_ALONE, Family
from moe.families.fields import Fields
from moe.families.match import family_of
from moe.sharding import variable_shardings
from moe.transformer import Transformer
from moe.validation import one_of
from moe.weights.compare import compare, told
from moe.weights.files import Planned, write_file
from moe.weights.folder import open_folder, weight_files
from moe.weights.pieces import Path, Piece, model_pieces, to_theirs, variable_shapes
from moe.weights.shards import Filling, nested, read_part
from moe.weights.texts import (
    CONFIG,
    clear,
    copy_tokenizer,
    plan_files,
    write_config,
    write_index,
)

__all__ = ['family_of', 'load_pretrained', 'pretrained_config', 'save_pretrained']

MAX_FILE_BYTES = 5_000_000_000
_SHOWN = 20
_SAMPLED = 16_000_000


def pretrained_config(path: str | os.PathLike[str], dtype: DType = 'bfloat16') -> TransformerConfig:
    """Reads what model a folder holds, without its weights.

    Args:
        path: of the folder, or of its config.json.
        dtype: of parameters and activations.

    Raises:
        InputError: where there is no such file, or its model is of no family here.
    """
    return _read_config(pathlib.Path(path).expanduser(), dtype)[0]


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: DType = 'bfloat16',
) -> tuple[TransformerConfig, dict[str, Any]]:
    """Loads a model from a folder of safetensors.

    Tensors are read one by one, each straight onto the devices that hold it: the host keeps less
    than twice the largest of them in memory, whatever the size of the model. Weights in fp8 with
    128 x 128 blocks and in MXFP4 are dequantised on the way. Layers of multi-token prediction, and
    the copy of a tied head, are left out.

    Args:
        path: with config.json, and model.safetensors or an index of several such files.
        mesh: whose devices shall hold the parameters; None for the first device alone.
        dtype: of the parameters, and of the activations in the config; selection biases are
            float32 whatever it says.

    Returns:
        The config, and the variables as `Transformer(config).init` gives them, unboxed: 'params'
        and, where routers have selection biases, 'routing'. `generate` takes them whole.

    Raises:
        InputError: for a folder that cannot be used; names all tensors that are missing, not of the
            model, of another shape, of a type that cannot be read, or not finite.
    """
    one_of('dtype', dtype, DType)
    folder = pathlib.Path(path).expanduser()
    config, family = _read_config(folder, dtype)
    sources = open_folder(folder)
    pieces = model_pieces(config, family)
    problems, sound = compare(pieces, sources, config, family)
    fillings = _fillings(config, mesh)
    checks = {
        piece.name: fillings[piece.path].write(piece, sources[piece.name].read(dtype))
        for piece in sound
    }
    problems += [
        f'{name}: has values that are not finite'
        for name, finite in checks.items()
        if not all(map(bool, finite))
    ]
    if problems:
        raise InputError(told(folder, family, problems))
    return config, nested({path: filling.finish() for path, filling in fillings.items()})


def folder_sha256(path: str | os.PathLike[str]) -> str:
    """Identifies a folder's weights: by its config, and of every file the header, size and ends.

    To hash all of a large model would take longer than to load it.

    Raises:
        InputError: where there is no safetensors file, or one is missing.
    """
    folder = pathlib.Path(path).expanduser()
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        with file.open('rb') as stream:
            digest.update(f'{file.name} {size}'.encode() + stream.read(_SAMPLED))
            stream.seek(max(0, size - _SAMPLED))
            digest.update(stream.read(_SAMPLED))
    return digest.hexdigest()


def _read_config(path: pathlib.Path, dtype: DType) -> tuple[TransformerConfig, Family]:
    file = path if path.name == CONFIG else path / CONFIG
    if not file.is_file():
        raise InputError(
            f'{path} must be a folder with a {CONFIG}, as transformers saves a model; there is '
            'none. Check the path.'
        )
    try:
        values = json.loads(file.read_text())
        model_type = values['model_type']
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{file} must be JSON with a model_type; it cannot be read ({error!r}). Fetch it again.'
        ) from error
    families = {name: f for f in (*FAMILIES, *READ_ALONE) for name in (f.model_type, *f.aliases)}
    if model_type not in families:
        raise InputError(
            f'{file}: model_type must be one of {", ".join(families)}; received {model_type!r}. '
            'Choose such a model, or add its table to moe.families.'
        )
    fields = Fields(values, file)
    _check_quantization(fields)
    try:
        config = families[model_type].read(fields)
        return _with_dtype(config, dtype), families[model_type]
    except InputError as error:
        prefix = '' if str(file) in str(error) else f'{file}: '
        raise InputError(f'{prefix}{error}') from error


def _with_dtype(config: TransformerConfig, dtype: DType) -> TransformerConfig:
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _check_quantization(fields: Fields) -> None:
    quantization = fields.get('quantization_config', default=None) or {}
    method = quantization.get('quant_method')
    blocks = quantization.get('weight_block_size') or [128, 128]
    if method not in (None, 'fp8', 'mxfp4') or list(blocks) != [128, 128]:
        raise InputError(
            f'{fields.file}: quantised weights must be fp8 in blocks of 128 x 128, or mxfp4; '
            f'received quant_method={method!r} with weight_block_size={blocks}. Choose a folder '
            'of the same model in bfloat16.'
        )


def _fillings(config: TransformerConfig, mesh: jax.sharding.Mesh | None) -> dict[Path, Filling]:
    shapes = variable_shapes(config)
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = dict.fromkeys(shapes, single)
    else:
        tree = variable_shardings(Transformer(config, mesh), mesh)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        shardings = {tuple(key.key for key in path): leaf for path, leaf in leaves}
    return {
        path: Filling(shape, _dtype_of(path, config), shardings[path])
        for path, shape in shapes.items()
    }


def _dtype_of(path: Path, config: TransformerConfig) -> Any:
    return jnp.dtype(config.param_dtype if path[0] == 'params' else 'float32')


def save_pretrained(
    path: str | os.PathLike[str],
    config: TransformerConfig,
    params: Any,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    card: str | None = None,
    context_length: int = 4096,
) -> None:
    """Writes a model into a folder that `transformers`, vLLM and their kin load.

    The weights keep their dtype, in safetensors of at most 5 GB each. config.json has the spelling
    of `transformers` 4 and that of 5. One tensor at a time is in the host's memory.

    Args:
        path: of the folder; made where it is missing, and what it holds of these files replaced.
        config: the model's.
        params: the parameters, or all variables where routers have selection biases; on any mesh.
            Every process that holds some of them has to make the call; the first one writes.
        tokenizer: a folder with tokenizer.json, from which the tokenizer's files are copied.
        card: the text of the model card, README.md.
        context_length: tokens that servers shall take for the longest text; no weight depends on
            it.

    Raises:
        InputError: where no family can express the model exactly (see `family_of`), or the
            parameters are not those of the config.
    """
    family = family_of(config)
    folder = pathlib.Path(path).expanduser()
    variables = params if 'params' in params else {'params': params}
    leaves = _checked_leaves(config, variables)
    pieces = {piece.name: piece for piece in model_pieces(config, family)}
    planned = [Planned(p.name, leaves[p.path].dtype, p.shape) for p in pieces.values()]
    writer = jax.process_index() == 0
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
    files = plan_files(planned, MAX_FILE_BYTES)
    for name, tensors in files.items():
        fetch = _fetcher(leaves, pieces)
        if writer:
            write_file(folder / name, tensors, fetch)
        else:
            for tensor in tensors:
                fetch(tensor.name)
    if writer:
        write_index(folder, files)
        ids = {} if tokenizer is None else copy_tokenizer(pathlib.Path(tokenizer), folder)
        write_config(folder, config, family, ids, context_length)
        if card is not None:
            (folder / 'README.md').write_text(card)


def _fetcher(leaves: Mapping[Path, Any], pieces: Mapping[str, Piece]) -> Any:
    def fetch(name: str) -> np.ndarray:
        piece = pieces[name]
        return to_theirs(read_part(leaves[piece.path], piece), piece)

    return fetch


def _checked_leaves(config: TransformerConfig, variables: Mapping[str, Any]) -> dict[Path, Any]:
    leaves = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables))
    }
    shapes = variable_shapes(config)
    wrong = [
        f'  {"/".join(path)}: required {shapes.get(path, "none")}, received '
        f'{leaves[path].shape if path in leaves else "none"}'
        for path in {**shapes, **leaves}
        if path not in leaves or leaves[path].shape != shapes.get(path)
    ]
    if wrong:
        raise InputError(
            '\n'.join(
                [
                    'params must be the unboxed variables of the config; these differ:',
                    *wrong[:_SHOWN],
                    "Give Transformer(config)'s variables, {'params': ..., 'routing': ...}.",
                ]
            )
        )
    return leaves
