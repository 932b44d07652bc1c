"""A teacher on devices of its own: its hidden states travel to the student's, its head did once."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from distill import distributed
from distill.partwise import PartwiseTeacher
from distill.teacher import OnlineTeacher
from distill.types import Batch, HiddenTargets
from moe.errors import InputError
from moe.sharding import batch_sharding, sharding_for
from moe.transformer import head_of

HEAD = 'head'


@dataclasses.dataclass(frozen=True)
class SeparateTeacher:
    """A teacher whose hidden states came with the batch; of itself the head alone is here."""

    def targets(self, variables: Any, batch: Batch) -> HiddenTargets:
        """Joins what was shipped.

        Args:
            variables: `Shipper.head`, on the student's devices.
            batch: from a `Shipper`.
        """
        if batch.targets is None:
            raise InputError(
                'A teacher on devices of its own needs batches that carry its hidden states; '
                'received one without. Take them from a distill.separate_teacher.Shipper.'
            )
        hidden: Any = batch.targets
        return HiddenTargets(hidden, variables[HEAD])


class Shipper:
    """Runs a teacher on its devices and puts batches, with what it says, on the student's.

    A token costs `Dt` numbers of the teacher's dtype to ship, where its logits would cost `V`.
    Where both meshes have equally many devices jax hands over without waiting, so the teacher is at
    the next batch while the student is at this one; elsewhere the call waits for the teacher.

    Args:
        teacher: its model's mesh, if any, is its own.
        variables: on the teacher's devices.
        meshes: the student's and the teacher's, of different devices of this process.
        micro_batches: parts of a batch that the teacher reads one after the other.

    Attributes:
        head: the variables of a `SeparateTeacher`, on the student's devices.
    """

    def __init__(
        self,
        teacher: OnlineTeacher,
        variables: Any,
        meshes: tuple[Mesh, Mesh],
        *,
        micro_batches: int = 1,
    ) -> None:
        if jax.process_count() > 1:
            raise InputError(
                'A teacher on devices of its own needs all devices in one process, which hands '
                f'arrays from one to the other; there are {jax.process_count()} processes. Leave '
                'its mesh out, and it shares that of the student.'
            )
        student, own = (batch_sharding(mesh) for mesh in meshes)
        self._student, self._own, self._variables = student, own, variables
        partwise = PartwiseTeacher(teacher, micro_batches)
        self._hidden = jax.jit(
            lambda variables, batch: partwise.ahead(variables, batch).targets, out_shardings=own
        )
        config = teacher.model.config
        head = jax.jit(head_of, static_argnums=(0, 2))(config, variables, config.dtype)
        axes = 'embed', 'vocab'
        sharding = sharding_for(head.shape, axes, meshes[0], where="The teacher's head")
        self.head = {HEAD: jax.device_put(head, sharding)}

    def __call__(self, batch: Batch) -> Batch:
        """Places a batch on the student's devices, with the teacher's hidden states as targets."""
        said = self._hidden(self._variables, distributed.global_batch(batch, self._own))
        placed = distributed.global_batch(batch, self._student)
        return dataclasses.replace(placed, targets=jax.device_put(said, self._student))
