"""Five divergences from the same teacher, at equal tokens: three seeds.

python -m experiments.sweep --config=configs/divergences.py --workdir=runs/divergences

Hardware: two CPU cores, 2 GB of memory. The minutes it takes, and what comes out, have not been
measured yet: no result is claimed here.
"""

import ml_collections

from configs import base, small


def get_config() -> ml_collections.ConfigDict:
    """All variants see the same batches and the same teacher, and differ in the loss."""
    terms = dict(
        forward_kl=base.term('forward_kl'),
        reverse_kl=base.term('reverse_kl'),
        jsd=base.term('jsd', beta=0.5),
        skew_forward_kl=base.term('skew_forward_kl', lam=0.1),
        skew_reverse_kl=base.term('skew_reverse_kl', lam=0.1),
    )
    variants = {name: dict(student=dict(terms=dict(loss=term))) for name, term in terms.items()}
    return small.sweep('forward_kl', variants)
