"""The same targets from beside the student and from disk, at equal tokens: three seeds.

python -m experiments.sweep --config=configs/cached.py --workdir=runs/cached

What is to be seen is that nothing is: the loss of every step.

Hardware: two CPU cores, 2 GB of memory. The minutes it takes, and what comes out, have not been
measured yet: no result is claimed here.
"""

import ml_collections

from configs import small


def get_config() -> ml_collections.ConfigDict:
    """The 64 likeliest ids with their tail, and 12 sampled ids, each made online and cached."""
    study = small.get_config()
    study.data.max_bytes = 2_000_000
    study.teacher.train.update(steps=100, checkpoint_every=100)
    study.student.train.update(steps=80, checkpoint_every=80, log_every=1)
    kinds = dict(top_k=dict(kind='top_k', k=64), sampled=dict(kind='sampled', distinct=12.0))
    variants = {
        f'{name}_{where}': dict(targets=kind | dict(cached=where == 'cached'))
        for name, kind in kinds.items()
        for where in ('online', 'cached')
    }
    return small.sweep(study, 'top_k_online', variants)
