"""A teacher that reads a batch in parts of its own: what that cannot go with."""

from typing import TYPE_CHECKING

from moe.errors import InputError

if TYPE_CHECKING:
    from experiments.study import StudyConfig


def require_partable(study: 'StudyConfig') -> None:
    """Refuses `teacher.micro_batches` that do not divide a batch, or that nobody would read by.

    Raises:
        InputError: names the key.
    """
    parts, size = study.teacher.micro_batches, study.data.batch_size
    assert parts is not None
    if parts < 1 or size % parts:
        raise InputError(
            f'config.teacher.micro_batches must divide data.batch_size={size}; received {parts}. '
            'Change one of them, or leave it out.'
        )
    wrong = {
        "teacher.source='remote', which reads on its own machine": study.teacher.source == 'remote',
        'more_teachers, which read with the student': bool(study.more_teachers),
        "student.features, which are compared while both models' layers are in memory": bool(
            study.student.features
        ),
        'student.cross_tokenizer, whose loss reads both models at once': (
            study.student.cross_tokenizer is not None
        ),
    }
    for what, holds in wrong.items():
        if holds:
            raise InputError(
                f'config.teacher.micro_batches cannot go with {what}. Leave one of them out.'
            )
