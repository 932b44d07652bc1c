"""What is inside of the teacher matched too, against its words alone, at equal tokens: three seeds.

python -m experiments.sweep --config=configs/features.py --workdir=runs/features

Hardware: two CPU cores, 2 GB of memory. The minutes it takes, and what comes out, have not been
measured yet: no result is claimed here.
"""

import ml_collections

from configs import base, small


def get_config() -> ml_collections.ConfigDict:
    """All variants see the same batches, teacher and KL, and differ in what is matched besides."""
    hidden = base.feature('hidden', weight=0.1, metric='cosine')
    relation = base.feature('relation', weight=0.1, heads=4)
    variants = dict(
        kl={},
        hidden=dict(student=dict(features=base.features(hidden=hidden))),
        relation=dict(student=dict(features=base.features(relation=relation))),
    )
    study = small.get_config()
    study.teacher.train.update(steps=300, checkpoint_every=300)
    study.student.train.update(steps=150, checkpoint_every=150)
    return small.sweep(study, 'kl', variants)
