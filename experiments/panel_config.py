"""Teachers besides the first, as a study's config describes them."""

import dataclasses
import os
from typing import Literal

from distill.provenance import Provenance
from experiments.causal import require_left_to_right
from moe.config import TransformerConfig, require
from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class FurtherTeacherConfig:
    """A teacher that was trained before, beside `config.teacher`.

    Attributes:
        source: 'checkpoint' or 'hf'.
        checkpoint: the folder of a stage that trained it, or, with 'hf', of a published model.
        dtype: of its frozen parameters and activations.
        provenance: its declaration.
        model: its architecture; with 'hf' that of the folder, whatever the config says here.
        weight: in the loss, beside those of the others; positive. Where data choose a token's
            teacher, weights do not count.
    """

    source: Literal['checkpoint', 'hf']
    checkpoint: str
    dtype: Literal['float32', 'bfloat16']
    provenance: Provenance
    model: TransformerConfig
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight > 0, 'weight', 'positive', self.weight)
        require_left_to_right(self.model)
        object.__setattr__(self, 'checkpoint', os.path.expanduser(self.checkpoint))


def require_together(
    more: dict[str, FurtherTeacherConfig] | None,
    *,
    route_field: str | None,
    kind: str,
    source: str,
    on_policy: bool,
) -> None:
    """Refuses what several teachers cannot do, and a choice among one.

    Args:
        more: the teachers besides the first, by name.
        route_field: of the data, that names a document's teacher.
        kind: of the targets.
        source: of the first teacher.
        on_policy: whether sequences are written while the student learns.

    Raises:
        InputError: names the key.
    """
    if not more:
        if route_field is not None:
            raise InputError(
                f'data.route_field={route_field!r} chooses among several teachers; received no '
                'more_teachers. Name some, or leave the field out.'
            )
        return
    wrong = {
        f"targets.kind={kind!r}: several teachers run beside the student, with kind='hidden'": (
            kind != 'hidden'
        ),
        f'teacher.source={source!r}, who teaches alone': source in ('ema', 'remote'),
        'student.rollout: sequences are written for one teacher': on_policy,
    }
    for what, holds in wrong.items():
        if holds:
            raise InputError(
                f'more_teachers ({", ".join(more)}) cannot go with {what}. Leave one of them out.'
            )
