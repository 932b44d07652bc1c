"""Architectures that a config need not describe: they are a published model's, or the student's."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from moe.config import TransformerConfig
from moe.convert import pretrained_config
from moe.surgery import EXECUTION, MODULES


def published_teacher(part: Any) -> TransformerConfig | None:
    """Puts a published teacher's architecture where the config describes the teacher."""
    if not isinstance(part, dict) or part.get('source') != 'hf' or not part.get('checkpoint'):
        return None
    folder = os.path.expanduser(part['checkpoint'])
    config = pretrained_config(folder, part.get('dtype', 'bfloat16'))
    part['model'] = dataclasses.asdict(config)
    # Said once, by the published model.
    del part['model']['vocab_size']
    return config


def published_start(values: dict[str, Any]) -> None:
    """Makes a student that copies a published model what that is, run as the config says."""
    part = values.get('student')
    part = part if isinstance(part, dict) else {}
    init, model = part.get('init'), part.get('model')
    if not (isinstance(init, dict) and isinstance(model, dict) and init.get('checkpoint')):
        return
    if init.get('source') != 'hf' or init.get('method') != 'copy':
        return
    folder = os.path.expanduser(init['checkpoint'])
    config = pretrained_config(folder, model.get('param_dtype', 'float32'))
    architecture = dataclasses.asdict(config)
    del architecture['vocab_size']
    for name in (*EXECUTION, *MODULES):
        _take_over(name.split('.'), model, architecture)
    part['model'] = architecture


def _take_over(path: Sequence[str], source: Any, target: Any) -> None:
    """Sets the value at a path, where both have such a path."""
    *parents, name = path
    for parent in parents:
        source, target = (each.get(parent) if each else None for each in (source, target))
    if source and target and name in source:
        target[name] = source[name]


def own_architecture(values: dict[str, Any]) -> None:
    """Puts the student's architecture where its own average teaches."""
    teacher, student = values.get('teacher'), values.get('student')
    if isinstance(teacher, dict) and isinstance(student, dict) and teacher.get('source') == 'ema':
        teacher['model'] = copy.deepcopy(student.get('model'))
