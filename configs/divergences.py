"""Five divergences from the same teacher, at equal tokens: three seeds.

python -m experiments.sweep --config=configs/divergences.py --workdir=runs/divergences

Hardware: two CPU cores, 2 GB of memory. Time: 64 minutes on a machine that had other work to do.
Expect (jax 0.10.2; means of three seeds with 95 % t-intervals, of differences paired by seed): the
forward KL reads held-out text at 2.60 bits per byte; the skew forward KL needs 0.10 more (0.04 to
0.16), JSD 0.13 (0.08 to 0.18), the skew reverse KL 0.17 (0.10 to 0.24), the reverse KL 0.35 (0.24
to 0.46). experiments/studies/divergences.md has all of it.
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
    return small.sweep(small.get_config(), 'forward_kl', variants)
