"""How each expert's load went while a model was trained: a line of a file for every row of metrics.

A line holds the loads over their layer's mean as float16, little-endian, in base64: under three
bytes for each expert of each router.
"""

import base64
import binascii
import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from moe.errors import InputError

LOAD_HISTORY = 'expert_load.jsonl'
_DTYPE = np.dtype('<f2')


@dataclasses.dataclass(frozen=True)
class LoadHistory:
    """Loads relative to an even share: 1 is balanced, 0 an expert that was never chosen.

    Attributes:
        steps: the updates at which a row was written, `[S]`.
        load: of each expert over the updates since the row before, `[S, routers, E]`, float32; a
            model's MoE layers come first, then its modules of multi-token prediction. Of a router
            that chose nothing, zeros.
    """

    steps: np.ndarray
    load: np.ndarray


def encode_load(load: np.ndarray) -> dict[str, int | str]:
    """Returns the fields of a line.

    Args:
        load: assignments to each expert, `[routers, E]`.
    """
    load = np.asarray(load, np.float64)
    relative = load / np.maximum(load.mean(-1, keepdims=True), 1e-12)
    text = base64.b64encode(relative.astype(_DTYPE).tobytes()).decode()
    return {'routers': len(load), 'load': text}


def read_load_history(path: str | os.PathLike[str]) -> LoadHistory | None:
    """Reads the lines of a run.

    Args:
        path: of the file `LOAD_HISTORY` in the folder of a trained stage.

    Returns:
        The history; None where there is no such file: the model has no experts.

    Raises:
        InputError: for a line that is no such line, or of another number of experts than the first.
    """
    path = Path(path)
    if not path.exists():
        return None
    rows = [
        _decoded(line, f'{path}, line {number}')
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), start=1)
    ]
    shapes = {load.shape for _, load in rows}
    if len(shapes) > 1:
        raise InputError(
            f'{path} must be of one model; received loads of the shapes {sorted(shapes)}. Train '
            'the stage again.'
        )
    if not rows:
        return None
    steps, loads = zip(*rows, strict=True)
    return LoadHistory(np.array(steps), np.stack(loads))


def _decoded(line: str, where: str) -> tuple[int, np.ndarray]:
    try:
        row = json.loads(line)
        data = base64.b64decode(row['load'], validate=True)
        load = np.frombuffer(data, _DTYPE).reshape(row['routers'], -1)
        return int(row['step']), load.astype(np.float32)
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise InputError(
            f'{where}, must hold step, routers and load, as a training run writes them; received '
            f'{line[:80]!r}. Train the stage again.'
        ) from error
