"""Whether a study fits its mesh, found out before anything is read, made or trained."""

import math

from jax.sharding import Mesh

from experiments.study import StudyConfig
from moe.errors import InputError
from moe.quantising import quantised_shardings
from moe.sharding import batch_sharding, variable_shardings
from moe.transformer import Transformer


def batch_shards(mesh: Mesh) -> int:
    """Counts the parts that the mesh splits the rows of a batch into."""
    return math.prod(mesh.shape[axis] for axis in batch_sharding(mesh).spec[0])


def require_fit(study: StudyConfig, mesh: Mesh, teacher_mesh: Mesh | None = None) -> None:
    """Refuses batches and models that the mesh does not divide, nor that of the teacher.

    Of a teacher whose matrices are quantised no group of numbers may be split either.

    Raises:
        InputError: names the key, or the parameter.
    """
    shards = batch_shards(mesh)
    size = study.data.batch_size
    micro_batches = {
        f'config.data.batch_size / {who}.train.micro_batches': size // train.micro_batches
        for who, train in study.trainings.items()
    }
    parts = study.teacher.micro_batches
    if parts is not None and teacher_mesh in (None, mesh):
        micro_batches['config.data.batch_size / config.teacher.micro_batches'] = size // parts
    rows = micro_batches | {
        'config.evaluate.batch_size': study.evaluate.batch_size,
        'config.evaluate.prefill_batch': study.evaluate.prefill_batch,
    }
    for key, received in rows.items():
        if received % shards:
            raise InputError(
                f'{key} must be a multiple of {shards}, the parts that the mesh axes data, fsdp '
                f'and expert split its rows into; received {received}. Change it, or the mesh.'
            )
    if study.evaluate.weights and mesh.size > 1:
        raise InputError(
            'config.evaluate.weights are measured on one device, where one text is written at a '
            f'time; the mesh has {mesh.size}. Leave them out, or set config.mesh.data=1.'
        )
    teacher_mesh = mesh if teacher_mesh is None else teacher_mesh
    size //= parts or 1
    if size % batch_shards(teacher_mesh):
        divided = 'config.data.batch_size' + (' / config.teacher.micro_batches' if parts else '')
        raise InputError(
            f'{divided} must be a multiple of {batch_shards(teacher_mesh)}, the parts '
            f'that config.teacher.mesh splits its rows into; received {size}. Change one of them.'
        )
    more = {f'more_teachers.{name}': own.model for name, own in (study.more_teachers or {}).items()}
    models = {'teacher': study.teacher.model, 'student': study.student.model} | more
    fits = [(f'config.{who}.model', config, mesh) for who, config in models.items()]
    if teacher_mesh is not mesh:
        fits.append(('On its own mesh config.teacher.model', study.teacher.model, teacher_mesh))
    for what, config, its in fits:
        try:
            variable_shardings(Transformer(config), its)
        except InputError as error:
            raise InputError(f'{what} does not fit the mesh. {error}') from error
    if study.teacher.weights is not None:
        try:
            quantised_shardings(
                Transformer(study.teacher.model, teacher_mesh), study.teacher.weights
            )
        except InputError as error:
            raise InputError(f'config.teacher.weights do not fit the mesh. {error}') from error
