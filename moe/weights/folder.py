"""A folder of safetensors files as one set of tensors, quantised ones among them."""

import dataclasses
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from moe.errors import InputError
from moe.weights.files import Stored, read_header
from moe.weights.quantized import (
    FP8_BLOCK,
    MXFP4_GROUP,
    dequantize_fp8,
    dequantize_mxfp4,
)

INDEX = 'model.safetensors.index.json'
_FLOATS = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALE, _BLOCKS, _SCALES = '_scale_inv', '_blocks', '_scales'
_READABLE = 'float32, float16 and bfloat16 can be read, and fp8 and MXFP4 with their scales'
_PICKLED = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl')


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor as it can be read.

    Attributes:
        shape: once it is dequantised.
        stored: what it is read from: itself, or its quantised values and after them their scales.
        problem: why it cannot be read; None where it can.
    """

    shape: tuple[int, ...]
    stored: tuple[Stored, ...]
    problem: str | None = None

    def read(self, dtype: str) -> np.ndarray:
        """Returns the tensor: mapped as it is stored, or dequantised to `dtype`."""
        values = self.stored[0].view()
        if len(self.stored) == 1:
            return values
        scales = self.stored[1].view()
        if values.dtype == _FP8:
            return np.asarray(dequantize_fp8(values, scales, dtype))
        # Stored [E, outputs, inputs]; the tensor that it stands for has the last two swapped.
        return np.asarray(dequantize_mxfp4(values, scales, dtype)).swapaxes(-1, -2)


def open_folder(path: pathlib.Path) -> dict[str, Source]:
    """Finds every tensor of a folder by its name, quantised ones by that of what they stand for.

    Raises:
        InputError: where there is no safetensors file, or one is missing or damaged.
    """
    stored: dict[str, Stored] = {}
    for file in weight_files(path):
        for name, tensor in read_header(file).items():
            if name in stored:
                raise InputError(
                    f'{path} must hold every tensor once; {name} is in {stored[name].file.name} '
                    f'and in {file.name}. Remove the file that does not belong there.'
                )
            stored[name] = tensor
    return _sources(stored)


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files that a folder's tensors are in.

    Raises:
        InputError: where there is none, or one that the index names is missing.
    """
    index = path / INDEX
    if index.exists():
        try:
            weight_map: dict[str, Any] = json.loads(index.read_text())['weight_map']
            names = sorted(set(weight_map.values()))
            files = [path / pathlib.PurePath(name).name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f'{index} must be JSON with a weight_map from tensors to files; it cannot be read '
                f'({error!r}). Fetch it again.'
            ) from error
    else:
        files = sorted(path.glob('*.safetensors'))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f'{path} lacks {", ".join(missing)}, which {INDEX} names. Fetch the missing files.'
        )
    if not files:
        raise InputError(_no_files(path))
    return files


def _no_files(path: pathlib.Path) -> str:
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        return (
            f'{path} must hold safetensors; it has {", ".join(pickled[:3])} alone. Such files are '
            'pickles, which can run any code when they are read, and are never opened here: fetch '
            'the safetensors of the model, or convert them where you trust them, with '
            "transformers' save_pretrained."
        )
    return (
        f'{path} must hold safetensors files; there are none. Give the folder that has config.json '
        'and the weights.'
    )


def _sources(stored: dict[str, Stored]) -> dict[str, Source]:
    sources = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored:
            continue
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in stored:
            continue
        if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in stored:
            whole = name.removesuffix(_BLOCKS)
            sources[whole] = _mxfp4(tensor, stored[whole + _SCALES])
        elif tensor.dtype == _FP8 and name + _SCALE in stored:
            sources[name] = _fp8(tensor, stored[name + _SCALE])
        else:
            known = tensor.dtype in _FLOATS
            problem = None if known else f'is {tensor.dtype}: {_READABLE}'
            sources[name] = Source(tensor.shape, (tensor,), problem)
    return sources


def _fp8(weight: Stored, scale: Stored) -> Source:
    needed = tuple(-(-size // FP8_BLOCK) for size in weight.shape)
    problem = None
    if len(needed) != 2 or scale.shape != needed or scale.dtype not in _FLOATS:
        problem = f'needs float scales {needed} of 128 x 128 blocks; has {scale.dtype}{scale.shape}'
    return Source(weight.shape, (weight, scale), problem)


def _mxfp4(blocks: Stored, scales: Stored) -> Source:
    half = MXFP4_GROUP // 2
    expected = (*scales.shape, half)
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8 or blocks.shape != expected:
        problem = f'needs uint8 _blocks [..., {half}] and _scales [...]; has {blocks.dtype}'
        problem += f'{blocks.shape} and {scales.dtype}{scales.shape}'
        return Source(blocks.shape, (blocks, scales), problem)
    whole = (*scales.shape[:-2], scales.shape[-1] * MXFP4_GROUP, *scales.shape[-2:-1])
    return Source(whole, (blocks, scales))
