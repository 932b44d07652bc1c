"""The online teacher says what its model says, and learns nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distill import Batch, OnlineTeacher
from moe.config import AttentionConfig, TransformerConfig
from moe.transformer import Transformer


def test_targets_are_the_models_logits_without_gradient():
    config = TransformerConfig(
        vocab_size=11, num_layers=1, embed_dim=8, mlp_dim=8, attention=AttentionConfig(2, 1, 4)
    )
    model = Transformer(config)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)
    # Two documents a row: positions and segments must reach the teacher.
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 0]])
    batch = Batch(tokens, tokens, segment_ids > 0, segment_ids, positions)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens))
    teacher = OnlineTeacher(model)

    targets = jax.jit(teacher.targets)(variables, batch)
    apply = jax.jit(model.apply)
    output = apply(variables, tokens, positions=positions, segment_ids=segment_ids)
    said = np.asarray(targets.hidden, np.float64) @ np.asarray(targets.head, np.float64)
    np.testing.assert_allclose(said, output.logits, rtol=1e-4, atol=1e-5)
    unsegmented = apply(variables, tokens)
    assert np.abs(said - unsegmented.logits)[0, 3:].max() > 1e-3

    def total(variables):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(teacher.targets(variables, batch)))

    for gradient in jax.tree.leaves(jax.jit(jax.grad(total))(variables)):
        np.testing.assert_array_equal(gradient, 0)
