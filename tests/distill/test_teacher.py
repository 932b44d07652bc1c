"""The online teacher says what its model says, and learns nothing."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distill import Batch, OnlineTeacher
from distill.partwise import PartwiseTeacher
from distill.separate_teacher import HEAD, Shipper
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.quantising import quantise
from moe.sharding import MeshConfig, make_mesh, variable_shardings
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


def test_a_quantised_teacher_says_what_its_rounded_matrices_do():
    config = TransformerConfig(
        vocab_size=12,
        num_layers=1,
        embed_dim=8,
        mlp_dim=8,
        attention=AttentionConfig(2, 1, 4),
        moe=MoEConfig(RouterConfig(4, 2), 6, dispatch='grouped'),
        scan_layers=False,
    )
    model = Transformer(config)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 12)
    batch = Batch(tokens, tokens, tokens >= 0, jnp.ones_like(tokens), jnp.arange(6) + 0 * tokens)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens))
    stored = quantise(model, variables, 'int8')

    def as_floats(path, kernel):
        of = functools.reduce(lambda tree, key: tree.get(key.key, {}), path, stored['quantised'])
        if not of:
            return kernel
        wide = np.asarray(of['values'], np.float64) * np.asarray(of['scales'])
        outputs = 2 if path[-1].key in ('q', 'k', 'v', 'gate_up') else 1
        wide = np.moveaxis(wide, -1, -1 - outputs).reshape(kernel.shape)
        assert (wide != kernel).any(), path
        return jnp.asarray(wide, jnp.float32)

    floats = {'params': jax.tree.map_with_path(as_floats, variables['params'])}
    teacher = OnlineTeacher(model)
    expected = jax.jit(teacher.targets)(floats, batch)
    partwise = PartwiseTeacher(teacher, 2)
    for found in (
        jax.jit(teacher.targets)(stored, batch),
        jax.jit(lambda of, batch: partwise.targets(of, partwise.ahead(of, batch)))(stored, batch),
    ):
        np.testing.assert_allclose(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.head, expected.head, rtol=1e-6)
    meshes = [make_mesh(MeshConfig(data=2), jax.devices()[at : at + 2]) for at in (0, 2)]
    apart = OnlineTeacher(model.clone(mesh=meshes[1]))
    placed = jax.device_put(variables, {'params': variable_shardings(model, meshes[1])['params']})
    shipper = Shipper(apart, quantise(apart.model, placed), (meshes[0], meshes[1]))
    sent = shipper(jax.tree.map(np.asarray, batch))
    np.testing.assert_allclose(sent.targets, expected.hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shipper.head[HEAD], expected.head, rtol=1e-6)
