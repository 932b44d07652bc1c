"""The same targets made beside the student and read from disk, at equal tokens: three seeds.

python -m experiments.sweep --config=configs/cached.py --workdir=runs/cached

Hardware: two CPU cores, 2 GB of memory. Time: 15 minutes on a machine that had other work to do.
Expect (jax 0.10.2; three seeds): no loss of any step differs by more than 0.00012 nats, by the
rounding of what is stored. experiments/studies/cached.md has all of it.
"""

import ml_collections

from configs import small


def get_config() -> ml_collections.ConfigDict:
    """Both variants learn from the 64 likeliest ids with their tail, and differ in where from."""
    study = small.get_config()
    study.data.max_bytes = 2_000_000
    study.teacher.train.update(steps=60, checkpoint_every=60)
    study.student.train.update(steps=60, checkpoint_every=60, log_every=1)
    study.targets.update(kind='top_k', k=64)
    variants = {
        where: dict(targets=dict(cached=where == 'cached')) for where in ('online', 'cached')
    }
    return small.sweep(study, 'online', variants)
