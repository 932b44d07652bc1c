"""The quickstart's student with its matrices quantised, and trained on for experts in 4 bits.

    python -m experiments.launch --config=configs/quantised.py --workdir=runs/quantised

Hardware: two CPU cores (x86-64 with AVX-512). Time: 9.3 minutes on a machine that had other work to
do. Expect (jax 0.10.2, qwix 0.1.8): a student of 1.88 MB takes 1.29 MB on disk in int8 and fp8, at
a KL of 0.0002 and 0.0014 nats a token from itself in floats, and 1.18 MB with experts in 4 bits, at
0.0021; trained on for that, 0.0008. Its float matrices fit in the caches: quantised ones decode no
faster here, 9,300 tokens a second in int8 to 18,900 in floats.
"""

import ml_collections

from configs import base, quickstart


def get_config() -> ml_collections.ConfigDict:
    """The quickstart on one device, with a stage more and a table more."""
    config = quickstart.get_config()
    config.mesh = base.mesh()
    config.quantise = base.quantise('int4_experts')
    config.quantise.train.update(steps=100, checkpoint_every=50)
    config.evaluate.weights = ('int8', 'fp8', 'int4_experts')
    return config
