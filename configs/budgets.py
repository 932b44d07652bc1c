"""Distillation against training on text alone, for a budget of steps: three seeds.

    for steps in 25 100; do
        python -m experiments.sweep --config=configs/budgets.py:$steps --workdir=runs/budget_$steps
    done

The figure to look at is each variant's own `control`: the same student without the teacher.

Hardware: two CPU cores, 2 GB of memory; 10 and 20 minutes with other work to do. To expect (fewer
bits per byte than the control, means of three seeds): `teacher` 0.06 at 25 steps and 0.16 at 100,
`both` 0.04 and 0.08. experiments/studies/budgets.md has all of it.
"""

import ml_collections

from configs import base, small


def get_config(steps: str = '100') -> ml_collections.ConfigDict:
    """Both variants see the same batches and the same teacher; one learns from the text too."""
    text = dict(text=base.term('cross_entropy', weight=0.5))
    half = dict(loss=base.term('forward_kl', weight=0.5))
    study = small.get_config()
    study.student.train.update(steps=int(steps), checkpoint_every=int(steps))
    variants = dict(teacher={}, both=dict(student=dict(terms=half | text)))
    return small.sweep(study, 'teacher', variants)
