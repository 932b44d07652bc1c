"""What stands beside the weights of a published model: config, index, tokenizer, card."""

import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from moe.config import TransformerConfig
from moe.errors import InputError
from moe.families import Family
from moe.weights.files import Planned
from moe.weights.folder import INDEX

CONFIG = 'config.json'
GENERATION = 'generation_config.json'
TOKENIZER_FILES = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'chat_template.jinja',
)
Files = Mapping[str, list[Planned]]


def plan_files(planned: Iterable[Planned], max_bytes: int) -> Files:
    """Distributes tensors over files, in order; one is larger only where its only tensor is."""
    files: list[list[Planned]] = [[]]
    room = max_bytes
    for tensor in planned:
        if files[-1] and tensor.nbytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    if len(files) == 1:
        return {'model.safetensors': files[0]}
    count = len(files)
    return {f'model-{i:05d}-of-{count:05d}.safetensors': f for i, f in enumerate(files, 1)}


def clear(folder: pathlib.Path) -> None:
    """Removes what an earlier export left and a reader could take for this one's."""
    for file in (*folder.glob('model*.safetensors'), folder / INDEX, folder / GENERATION):
        file.unlink(missing_ok=True)


def write_index(folder: pathlib.Path, files: Files) -> None:
    """Says which file has which tensor, where there are several."""
    if len(files) > 1:
        weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
        total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
        _write_json(folder / INDEX, {'metadata': {'total_size': total}, 'weight_map': weight_map})


def write_config(
    folder: pathlib.Path,
    config: TransformerConfig,
    family: Family,
    ids: Mapping[str, int],
    context_length: int,
) -> None:
    """Writes config.json and, where the tokenizer brought none, generation_config.json."""
    values = {
        'architectures': [family.architecture],
        'model_type': family.model_type,
        **family.write(config),
        'max_position_embeddings': context_length,
        'dtype': config.param_dtype,
        'torch_dtype': config.param_dtype,
        'use_cache': True,
        **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')),
        **ids,
    }
    _write_json(folder / CONFIG, values)
    if not (folder / GENERATION).exists():
        _write_json(folder / GENERATION, {'do_sample': True, **ids})


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> dict[str, int]:
    """Copies the tokenizer's files, and returns the ids of its special tokens."""
    if not (source / 'tokenizer.json').is_file():
        raise InputError(
            f'tokenizer must be a folder with a tokenizer.json; there is none in {source}.'
        )
    for name in (*TOKENIZER_FILES, GENERATION):
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    return special_ids(source)


def special_ids(folder: pathlib.Path) -> dict[str, int]:
    """Returns `bos_token_id`, `eos_token_id` and `pad_token_id` of a folder's tokenizer.

    Those that its tokenizer_config.json names and its tokenizer.json has.
    """
    settings = _json_or_empty(folder / 'tokenizer_config.json')
    tokenizer = _json_or_empty(folder / 'tokenizer.json')
    vocabulary = tokenizer.get('model', {}).get('vocab', {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token['content']: token['id'] for token in tokenizer.get('added_tokens', [])}
    named = {}
    for role in ('bos', 'eos', 'pad'):
        token = settings.get(f'{role}_token')
        content = token.get('content') if isinstance(token, dict) else token
        if content in ids:
            named[f'{role}_token_id'] = ids[content]
    return named


def _json_or_empty(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, allow_nan=False) + '\n')
