"""A student that learns from what it writes, against one that learns from text alone: three seeds.

    python -m experiments.sweep --config=configs/on_policy.py --workdir=runs/on_policy

The figure to look at is `kl_on_own_text`, beside `kl_from_teacher`, which is of held-out text.

Hardware: two CPU cores (x86-64), 2 GB of memory. Time: 49 minutes on a machine that had other work
to do.
Expect (jax 0.10.2; means of three seeds): no difference on own text, 0.018 nats more than `text`
where half of the sequences are the student's (-0.018 to 0.053) and 0.011 where some of them are
replayed (-0.071 to 0.093). experiments/studies/on_policy.md has all of it.
"""

import ml_collections

from configs import base, small


def study() -> ml_collections.ConfigDict:
    """The small study, in the bytes of short documents, by JSD and with a rollout."""
    config = small.get_config()
    config.data.update(tokenizer='byte', max_bytes=2_000_000, seq_len=96, held_out_documents=32)
    config.student.terms = dict(jsd=base.term('jsd', beta=0.5))
    config.student.rollout = base.rollout()
    config.student.rollout.max_new_tokens = 32
    config.evaluate.update(context_length=96, sample_tokens=32)
    return config


def get_config() -> ml_collections.ConfigDict:
    """All variants see the same batches and the same teacher, and differ in who writes."""
    variants = dict(
        text=dict(student=dict(rollout=dict(lmbda=0.0))),
        student=dict(student=dict(rollout=dict(lmbda=0.5))),
        replayed=dict(student=dict(rollout=dict(lmbda=0.5, replay_share=0.5, staleness=8))),
    )
    return small.sweep(study(), 'text', variants)
