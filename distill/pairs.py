"""Which divergence is sound on which form of target, as one table.

A pair is 'exact'; 'unbiased', where samples of the teacher stand for an average over it; or
'refused', with the reason and the nearest sound choice: it would train on without a word, towards
something else.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from distill.algebra import DIVERGENCES
from distill.objective import Term
from distill.types import DenseTargets, HiddenTargets, SampledTargets, TopKTargets
from moe.errors import InputError

Form = Literal['hidden', 'dense', 'top_k', 'sampled']
Targets = HiddenTargets | DenseTargets | TopKTargets | SampledTargets


class Pair(NamedTuple):
    """How sound a divergence is on a form of target.

    Attributes:
        kind: whether it may be used, and as what.
        note: what the value is; of a refused pair, why it is refused.
        instead: the nearest sound choice, of a refused pair.
    """

    kind: Literal['exact', 'unbiased', 'refused']
    note: str = ''
    instead: str = ''


FORMS: dict[type, Form] = {
    HiddenTargets: 'hidden',
    DenseTargets: 'dense',
    TopKTargets: 'top_k',
    SampledTargets: 'sampled',
}

_OF_STUDENT = 'it averages over what the student would say, of which the samples tell nothing'
_NOT_LINEAR = (
    "it is not linear in the teacher's probabilities, so that estimates of them by counts bias it"
)
_ORDER = "it needs the teacher's order, which counts tell with noise"

_REFUSED = {
    'reverse_kl': _OF_STUDENT,
    'jsd': _NOT_LINEAR,
    'skew_forward_kl': _NOT_LINEAR,
    'skew_reverse_kl': _OF_STUDENT,
    'jeffreys': _OF_STUDENT,
    'alpha_divergence': _NOT_LINEAR,
    'adaptive_kl': _OF_STUDENT,
    'total_variation': _NOT_LINEAR,
    'hinge': _ORDER,
    'ranking': _ORDER,
}
_SAMPLED = {
    'cross_entropy': Pair('unbiased', 'value and gradient'),
    'forward_kl': Pair(
        'unbiased', "the gradient; the value is the cross-entropy: the teacher's entropy too much"
    ),
} | {
    name: Pair('refused', why, f'forward_kl on these samples, or {name} on top_k targets')
    for name, why in _REFUSED.items()
}
_BUCKETS = Pair('exact', 'between distributions over the kept ids and, as one more, all others')
_ORDERED = Pair('exact', 'where no fewer ids are kept than it orders')

PAIRS: dict[Form, dict[str, Pair]] = {
    'hidden': dict.fromkeys(DIVERGENCES, Pair('exact')),
    'dense': dict.fromkeys(DIVERGENCES, Pair('exact')),
    'top_k': dict.fromkeys(DIVERGENCES, _BUCKETS) | {'hinge': _ORDERED, 'ranking': _ORDERED},
    'sampled': _SAMPLED,
}


def require_sound(
    terms: Sequence[Term], form: Form, *, temperature: float = 1.0, kept: int | None = None
) -> None:
    """Refuses terms that are unsound on a form of target, by name.

    Terms against labels are sound whatever the teacher says.

    Args:
        terms: of an objective.
        form: of what the teacher says.
        temperature: that 'top_k' or 'sampled' targets were recorded at; of logits, any will do.
        kept: ids of each token that a loss of order can choose from: those of 'top_k' targets, else
            the vocabulary; None where not known yet.

    Raises:
        InputError: with the reason and the nearest sound choice.
    """
    for term in terms:
        if term.needs_teacher:
            require_sound_pair(term, form, temperature=temperature, kept=kept)


def require_sound_pair(
    term: Term, form: Form, *, temperature: float = 1.0, kept: int | None = None
) -> None:
    """Refuses one term against a teacher, as `require_sound` does."""
    pair = PAIRS[form][term.name]
    if pair.kind == 'refused':
        raise InputError(
            f'{term.name} is not sound on {form} targets: {pair.note}. Use {pair.instead}.'
        )
    if form in ('top_k', 'sampled'):
        _require_as_recorded(term, form, temperature)
    k = term.parameter if term.divergence.orders else 0
    if kept is not None and kept < k:
        raise InputError(
            f'{term.name} orders k={k} ids, and {form} targets must have at least as many; '
            f'received {kept} of each token. Lower k, or keep more.'
        )


def _require_as_recorded(term: Term, form: Form, temperature: float) -> None:
    """Logits that were not kept can be neither divided by another temperature nor standardised."""
    if not isinstance(term.temperature, (int, float)) or term.temperature != temperature:
        raise InputError(
            f'The temperature of {term.name} on {form} targets must be the {temperature} that they '
            f'were recorded at, since it divides logits, which were not kept; received '
            f'{term.temperature!r}. Set it to {temperature}, or record targets anew.'
        )
    if term.standardize:
        raise InputError(
            f'{term.name} with standardize=True needs the mean and deviation of all logits, which '
            f'{form} targets do not keep. Leave it out, or use hidden or dense targets.'
        )
