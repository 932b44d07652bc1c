"""A student upcycled from its teacher against one from scratch, at equal tokens: three seeds.

    python -m experiments.sweep --config=configs/upcycle.py --workdir=runs/upcycle

Hardware: two CPU cores (x86-64 with AVX-512), 2 GB of memory. Time: 17 minutes of one core for all
three seeds; on a machine that had other work to do, an hour.
Expect (jax 0.10.2; means of three seeds with 95 % t-intervals): after 123k tokens the upcycled
student reads held-out text at 2.47 bits per byte, the one from scratch at 3.07, a difference of
0.60 (0.43 to 0.77) paired by seed; their controls without a teacher at 2.49 and 3.18, 0.69 (0.53 to
0.84) apart. The teacher, which both learn from and one starts from, is at 2.53 after 307k tokens.
experiments/studies/upcycle.md has all of it.
"""

import ml_collections

from configs import base


def study() -> ml_collections.ConfigDict:
    """A student of its teacher's depth, width and FLOPs per token, and of more parameters."""
    config = base.get_config()
    config.data.update(vocab_size=1024, max_bytes=4_000_000, seq_len=128, batch_size=8)
    config.data.update(held_out_fraction=0.1, held_out_documents=24)
    for part in (config.teacher, config.student):
        part.model.update(num_layers=3, embed_dim=96, mlp_dim=384)
        part.model.attention.update(num_heads=3, num_kv_heads=1, head_dim=32)
        part.optimizer.update(name='muon', learning_rate=5e-3, warmup_steps=20)
    config.teacher.train.update(steps=300, checkpoint_every=300)

    student = config.student
    # Four slices of the teacher's MLP, each four times over: a token's four are one MLP.
    student.model.moe.update(expert_dim=96)
    student.model.moe.router.update(num_experts=16, experts_per_token=4)
    student.train.update(steps=120, checkpoint_every=120, log_every=2)
    student.balance.update(selection_bias_rate=0.01, load_balance_weight=0.01)
    student.terms.kl.weight = 0.5
    student.terms.ce.weight = 0.5
    config.evaluate.update(context_length=128, prefill_batch=8, sample_tokens=16)
    return config


def get_config() -> ml_collections.ConfigDict:
    """Both variants see the same batches and the same teacher, and differ in `student.init`."""
    config = ml_collections.ConfigDict()
    config.study = study()
    config.seeds = (0, 1, 2)
    config.baseline = 'scratch'
    config.variants = dict(
        scratch=dict(student=dict(init=dict(method='random'))),
        upcycled=dict(student=dict(init=dict(method='upcycle'))),
    )
    return config
