"""All of a teacher against what may be kept of it, at equal tokens: three seeds.

python -m experiments.sweep --config=configs/targets.py --workdir=runs/targets

Hardware: two CPU cores, 2 GB of memory; 78 minutes with other work to do. To expect (more bits per
byte than `hidden`): sampled 0.02, top_k 0.19, truncated 0.25. experiments/studies/targets.md has
all of it.
"""

import ml_collections

from configs import small


def get_config() -> ml_collections.ConfigDict:
    """All variants see the same batches, teacher and loss, and differ in what they see of it.

    Those that keep part of it keep about as much: 12 ids a token.
    """
    variants = dict(
        hidden=dict(targets=dict(kind='hidden')),
        sampled=dict(targets=dict(kind='sampled', distinct=12.0)),
        top_k=dict(targets=dict(kind='top_k', k=12)),
        truncated=dict(targets=dict(kind='truncated', k=12)),
    )
    return small.sweep(small.get_config(), 'hidden', variants)
