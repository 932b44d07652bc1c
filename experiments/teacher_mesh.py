"""A teacher that has the last of the devices to itself: which those are, and what cannot go."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from moe.errors import InputError
from moe.sharding import MeshConfig, make_mesh

if TYPE_CHECKING:
    from experiments.study import StudyConfig


def make_meshes(
    student: MeshConfig, teacher: MeshConfig | None, devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, Mesh]:
    """Makes the mesh of the study and that of its teacher, the same where it has none of its own.

    Args:
        student: `config.mesh`, of the devices that the teacher leaves.
        teacher: `config.teacher.mesh`, of the last devices; None for the study's.
        devices: all of them, by default those of all processes.

    Raises:
        InputError: where the two do not share out the devices, with the numbers.
    """
    devices = jax.devices() if devices is None else devices
    if teacher is None:
        mesh = make_mesh(student, devices)
        return mesh, mesh
    if jax.process_count() > 1:
        raise InputError(
            'config.teacher.mesh needs all devices in one process, which hands what the teacher '
            f'says from its devices to the others; there are {jax.process_count()} processes. '
            'Leave it out: the teacher then shares config.mesh.'
        )
    sizes = teacher.data, teacher.fsdp, teacher.expert, teacher.tensor
    taken = 1
    for size in sizes:
        taken *= size
    if -1 in sizes or taken >= len(devices):
        received = '-1 for the rest' if -1 in sizes else f'{taken}'
        raise InputError(
            'config.teacher.mesh must take a number of devices that leaves the student one at '
            f'least, so at most {len(devices) - 1} of {len(devices)}; received {received} '
            f'({teacher}). Say how many, or leave it out.'
        )
    try:
        own = make_mesh(student, devices[:-taken])
    except InputError as error:
        raise InputError(f'config.teacher.mesh takes {taken} of the devices. {error}') from error
    return own, make_mesh(teacher, devices[-taken:])


def require_separable(study: 'StudyConfig') -> None:
    """Refuses, with `teacher.mesh`, what needs the teacher in the student's own program.

    Raises:
        InputError: names the key.
    """
    student, source, targets = study.student, study.teacher.source, study.targets
    wrong = {
        f'teacher.source={source!r}, whose weights are not apart from the student or not here': (
            source in ('ema', 'remote')
        ),
        f'targets.kind={targets.kind!r}: hidden states are shipped': targets.kind != 'hidden',
        'more_teachers: one teacher alone has devices of its own': bool(study.more_teachers),
        'student.rollout: what is written in the update is scored in it': (
            student.rollout is not None
        ),
        'student.features: what is inside of the teacher is not shipped': bool(student.features),
        f'student.return_weight={student.return_weight}: returns are of what is written': (
            student.return_weight > 0
        ),
        'student.cross_tokenizer: its loss reads both models in one program': (
            student.cross_tokenizer is not None
        ),
    }
    for what, holds in wrong.items():
        if holds:
            raise InputError(f'teacher.mesh cannot go with {what}. Leave one of them out.')
