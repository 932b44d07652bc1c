"""A student that learns from a teacher of another tokenizer: how, as data, and what cannot go."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from distill.algebra import Divergence
from distill.cross_tokenizer import SpanLoss
from distill.schedules import Schedule, bounds_of
from distill.spans import MatchedVocabulary
from moe.errors import InputError
from moe.validation import one_of, require

if TYPE_CHECKING:
    from distill.objective import Objective

Method = Literal['uld', 'gold', 'dskd']
# What 'gold' alone takes, and its defaults where they are not the loss's own.
_HYBRID = ('divergence', 'beta', 'matched_weight', 'unmatched_weight')


@dataclasses.dataclass(frozen=True)
class CrossTokenizer:
    """How a student is compared with a teacher that reads the text in tokens of its own.

    Attributes:
        method: 'uld' (sorted probabilities of each span of equal bytes), 'gold' (ids that stand
            for the same bytes by a divergence, the rest sorted), see `distill.cross_tokenizer`; or
            'dskd' (each model under the other's head, through learnt projectors), see
            `distill.dual_space`.
        weight: of the mean over spans, or over tokens with 'dskd', beside the terms; zero or more;
            a number or a `Schedule`.
        temperature: divides the logits of both sides, positive.
        divergence: of 'gold' alone: 'forward_kl', 'reverse_kl' or 'jsd', the last if not given.
        beta: of 'jsd' alone; 0.5 if not given.
        matched_weight: of 'gold' alone: of the shared ids; None for their share of the teacher's
            vocabulary.
        unmatched_weight: of 'gold' alone: of the rest; None for one less that share.
        teacher_seq_len: tokens of the teacher's rows; None for twice as many as the student's. What
            finds no room there is not compared.
    """

    method: Method
    weight: float | Schedule = 1.0
    temperature: float = 1.0
    divergence: str | None = None
    beta: float | None = None
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    teacher_seq_len: int | None = None

    def __post_init__(self) -> None:
        one_of('method', self.method, Method)
        for name in _HYBRID:
            value = getattr(self, name)
            if self.method != 'gold' and value is not None:
                raise InputError(
                    f'{self.method} takes no {name}; received {value!r}: leave it out, or choose '
                    "method='gold'."
                )
        for name in ('matched_weight', 'unmatched_weight'):
            value = getattr(self, name)
            require(value is None or value >= 0, name, 'zero or more, or None', value)
        room = self.teacher_seq_len
        require(room is None or room > 1, 'teacher_seq_len', 'at least 2, or None', room)
        low = min(bounds_of(self.weight))
        require(low >= 0, 'weight', 'zero or more', self.weight)
        self.span_loss(None, chunk_size=1)

    def span_loss(self, vocabulary: MatchedVocabulary | None, *, chunk_size: int) -> SpanLoss:
        """Returns the loss of a span.

        Args:
            vocabulary: ids that both sides share; read by 'gold'.
            chunk_size: spans whose measures exist at one time.
        """
        name, beta = self.divergence or 'jsd', self.beta
        if beta is not None and name != 'jsd':
            raise InputError(f'{name} takes no beta; received {beta!r}: leave it out.')
        if beta is None and name == 'jsd':
            beta = 0.5
        return SpanLoss(
            vocabulary if self.method == 'gold' else None,
            Divergence(name, beta),
            self.matched_weight,
            self.unmatched_weight,
            self.temperature,
            chunk_size,
        )


def require_across(objective: 'Objective') -> None:
    """Refuses, beside a teacher of another tokenizer, what compares token by token.

    Raises:
        InputError: names the term, or what else.
    """
    taught = [term.name for term in objective.terms if term.needs_teacher]
    wrong: dict[str, Any] = {
        f'{", ".join(taught)}: such terms compare id by id': taught,
        'features: they are of the same tokens on both sides': objective.features,
        f'return_weight={objective.return_weight}: returns need the probabilities of the '
        "student's tokens": objective.return_weight > 0,
    }
    for what, holds in wrong.items():
        if holds:
            raise InputError(
                'cross_tokenizer, for a teacher of another tokenizer, cannot go with '
                f'{what}. Leave it out: cross_entropy may stay.'
            )
