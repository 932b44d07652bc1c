"""Who a teacher is, and whether its terms permit what is done with what it says."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe.errors import InputError

ON_OUTPUTS = 'training on its outputs'
FROM_WEIGHTS = 'training from its weights'


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What is declared of a teacher; None where it is not.

    Attributes:
        name: of the model.
        version: which of its weights: a release, a revision, a checksum.
        licence: of the model, or the terms that its outputs come under.
        permits_training: whether these allow another model to be trained on its outputs, or, of
            one that a student starts from, to be made of its weights.
    """

    name: str | None = None
    version: str | None = None
    licence: str | None = None
    permits_training: bool | None = None

    def __post_init__(self) -> None:
        for name in ('name', 'version', 'licence'):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise InputError(
                    f'provenance.{name} must be a text that is not blank, or None; received '
                    f'{value!r}.'
                )

    def filled(self, defaults: 'Provenance') -> 'Provenance':
        """Returns the declaration with defaults for what is not declared."""
        fields = {
            name: getattr(defaults, name) if value is None else value
            for name, value in vars(self).items()
        }
        return Provenance(**fields)


# What a folder tells of itself; its terms are for the user to read and to declare.
PUBLISHED = Provenance(name='a published model', version='its weights')


def require_permission(
    provenance: Provenance | Mapping[str, Any],
    who: str,
    *,
    key: str = 'config.teacher.provenance',
    use: str = ON_OUTPUTS,
) -> None:
    """Refuses a model that is not declared in full, or whose terms forbid what it is used for.

    Every remote teacher is checked with this before it is asked anything.

    Args:
        provenance: the declaration, or its fields.
        who: what to call it in the message.
        key: of the config, where it is declared.
        use: what the terms have to permit: `ON_OUTPUTS` of a teacher, `FROM_WEIGHTS` of a start.

    Raises:
        InputError: names what is not declared, or that its terms forbid it.
    """
    if not isinstance(provenance, Provenance):
        provenance = Provenance(**provenance)
    missing = [name for name, value in vars(provenance).items() if value is None]
    if missing:
        raise InputError(
            f'{who} must be declared: name, version, licence, and permits_training (whether '
            f'its terms allow {use}); {", ".join(missing)} missing. Read its terms, and set {key}.'
        )
    if not provenance.permits_training:
        raise InputError(
            f'{who} ({provenance.name} {provenance.version}, {provenance.licence}) is declared '
            f'with permits_training=False: its terms forbid {use}. Choose another.'
        )


def in_words(provenance: Mapping[str, Any], use: str = ON_OUTPUTS) -> str:
    """Renders a full declaration as a phrase; `use` as in `require_permission`."""
    permits = 'permit' if provenance['permits_training'] else 'forbid'
    return (
        f'{provenance["name"]} {provenance["version"]}; licence: {provenance["licence"]}; its '
        f'terms {permits} {use}'
    )
