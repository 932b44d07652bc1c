"""A teacher and a student of different tokenizers: whose ids a model has, and what cannot go."""

import os
import pathlib
from typing import TYPE_CHECKING, Any

from distill.checkpoint import read_metadata
from moe.convert import pretrained_config
from moe.errors import InputError

if TYPE_CHECKING:
    from experiments.study import StudyConfig


def own_vocab_sizes(values: dict[str, Any], data_size: int) -> dict[str, int]:
    """Returns the vocabulary of teacher and student, where each has its own.

    Args:
        values: of the whole config.
        data_size: of the tokenizer that config.data describes.

    Returns:
        By 'teacher' and 'student'; {} where both have one tokenizer, and for a malformed config,
        which is left to `build`.
    """
    student, teacher = values.get('student'), values.get('teacher')
    if not (isinstance(student, dict) and student.get('cross_tokenizer')):
        return {}
    if not isinstance(teacher, dict):
        return {}
    init = student.get('init')
    return {
        'teacher': _vocab_size(teacher) or data_size,
        'student': (_vocab_size(init) if isinstance(init, dict) else None) or data_size,
    }


def _vocab_size(part: dict[str, Any]) -> int | None:
    """The vocabulary of a model that is there already; None where the config names none."""
    source, checkpoint = part.get('source'), part.get('checkpoint')
    if source not in ('hf', 'checkpoint') or not isinstance(checkpoint, str):
        return None
    folder = pathlib.Path(os.path.expanduser(checkpoint))
    if source == 'hf':
        return pretrained_config(folder, 'float32').vocab_size
    return read_metadata(folder / 'model').metadata['identity']['model']['vocab_size']


def require_two_tokenizers(study: 'StudyConfig') -> None:
    """Refuses, with `student.cross_tokenizer`, what needs one tokenizer for both models.

    Raises:
        InputError: names the key.
    """
    init, source, targets = study.student.init, study.teacher.source, study.targets
    from_teacher = not init.is_random and init.source == 'teacher'
    wrong = {
        f"teacher.source={source!r}: such a teacher has the study's own tokenizer, or no weights "
        "here. Set 'checkpoint' or 'hf'": source not in ('checkpoint', 'hf'),
        f"targets.kind={targets.kind!r}: all that the teacher says is compared. Set 'hidden'": (
            targets.kind != 'hidden'
        ),
        'more_teachers: one teacher alone is aligned. Leave them out': bool(study.more_teachers),
        'student.rollout: what is written has no counterpart in the tokens of the teacher. Leave '
        'it out': study.student.rollout is not None,
        f'student.init.method={init.method!r} from the teacher, whose embeddings are of other '
        "tokens. Start at random, or set student.init.source to 'checkpoint' or 'hf'": from_teacher,
    }
    for what, holds in wrong.items():
        if holds:
            raise InputError(f'student.cross_tokenizer cannot go with {what}.')
