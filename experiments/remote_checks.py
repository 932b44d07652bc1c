"""What a study may ask of a teacher behind a server, found out when the config is built."""

from typing import TYPE_CHECKING

from moe.errors import InputError

if TYPE_CHECKING:
    from experiments.study import StudyConfig


def require_askable(study: 'StudyConfig') -> None:
    """Refuses what a server cannot give: its weights, and what it does not list.

    Raises:
        InputError: names the key.
    """
    init, targets = study.student.init, study.targets
    if not init.is_random and init.source == 'teacher':
        raise InputError(
            f"config.student.init.method={init.method!r} starts from the teacher's weights, which "
            "a remote teacher does not give. Choose 'random', or a checkpoint."
        )
    if targets.kind == 'text':
        return
    if (targets.kind, targets.cached, targets.temperature) != ('top_k', True, 1.0):
        raise InputError(
            "A remote teacher gives texts (config.targets.kind='text'), or top log-probabilities, "
            "once and at temperature 1: config.targets.kind='top_k', cached=True and "
            f'temperature=1.0; received kind={targets.kind!r}, cached={targets.cached}, '
            f'temperature={targets.temperature}.'
        )
    ordering = [term.name for term in study.student.terms.values() if term.divergence.orders]
    if ordering:
        raise InputError(
            f'{ordering[0]} orders the ids of every token, and of some a remote teacher says '
            "nothing. Use a divergence of probabilities, such as 'forward_kl'."
        )


def require_text_alone(study: 'StudyConfig') -> None:
    """Refuses terms that ask a teacher of whom there is its text alone.

    Raises:
        InputError: names them.
    """
    asks = study.student.objective().needs_teacher or study.student.rollout is not None
    if study.teacher.source != 'remote' or asks:
        terms = ', '.join(term.name for term in study.student.terms.values())
        raise InputError(
            "config.targets.kind='text' is for texts of a teacher with source='remote', which the "
            f'student learns by cross_entropy alone; received source={study.teacher.source!r} and '
            f'terms {terms}. Keep that term, leave the others and a rollout out, or choose other '
            'targets.'
        )
