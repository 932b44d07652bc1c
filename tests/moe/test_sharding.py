"""Meshes and logical rules: what splits what; a rule that cannot hold names the parameter."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    LogicalRules,
    MeshConfig,
    abstract_variables,
    batch_sharding,
    constrain,
    init_sharded,
    logical_axes,
    make_mesh,
    sharding_for,
    spec_for,
    variable_shardings,
)
from moe.transformer import Transformer


class OneMatrix(nn.Module):
    """An embedding of any shape and logical axes, and a bias that is state."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        init = nn.initializers.normal(1.0)
        if self.axes is not None:
            init = nn.with_logical_partitioning(init, self.axes)
        table = self.param('table', init, self.shape)
        self.variable('routing', 'bias', jnp.zeros, (3,))
        return constrain(table[tokens], ('batch', 'length', None), self.mesh)


def config(**changes: Any) -> TransformerConfig:
    experts = MoEConfig(
        router=RouterConfig(num_experts=4, experts_per_token=2, selection_bias=True),
        expert_dim=8,
        shared_dim=8,
        dispatch='dense',
        first_dense_layers=1,
    )
    fields = {
        'vocab_size': 32,
        'num_layers': 3,
        'embed_dim': 16,
        'mlp_dim': 24,
        'attention': AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm='full'),
        'moe': experts,
    }
    return TransformerConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    ('mesh', 'sizes'),
    [
        (MeshConfig(data=8), (8, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, expert=1, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=-1, expert=4), (2, 1, 4, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2, expert=-1), (2, 2, 1, 2)),
    ],
)
def test_make_mesh_fills_in_the_rest(mesh: MeshConfig, sizes: tuple[int, ...]) -> None:
    made = make_mesh(mesh)
    assert made.axis_names == MESH_AXES
    assert tuple(made.shape.values()) == sizes
    assert set(made.axis_types) == {AxisType.Auto}
    assert set(made.devices.flat) == set(jax.devices())


def test_make_mesh_of_some_devices() -> None:
    devices = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(tensor=-1), devices)
    assert mesh.shape['tensor'] == 4
    assert set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize('mesh', [MeshConfig(data=3), MeshConfig(), MeshConfig(fsdp=3, data=-1)])
def test_mesh_that_is_not_the_device_count(mesh: MeshConfig) -> None:
    with pytest.raises(InputError, match=r'data=.*fsdp=.* there are 8\. .*set one axis to -1'):
        make_mesh(mesh)


@pytest.mark.parametrize('size', [0, -2, 1.5, True, '2'])
def test_mesh_axis_must_be_a_positive_integer(size: object) -> None:
    with pytest.raises(InputError, match=r'mesh\.expert must be a positive integer'):
        MeshConfig(expert=size)


def test_only_one_axis_takes_the_rest() -> None:
    with pytest.raises(InputError, match='At most one mesh axis may be -1'):
        MeshConfig(data=-1, tensor=-1)


def test_default_rules() -> None:
    assert spec_for(('batch', 'length', None)) == PartitionSpec(
        ('data', 'fsdp', 'expert'), None, None
    )
    assert spec_for(('experts', 'embed', None, 'mlp')) == PartitionSpec(
        'expert', 'fsdp', None, 'tensor'
    )
    assert spec_for(('vocab', 'embed')) == PartitionSpec('tensor', 'fsdp')
    assert spec_for(('layers', 'heads', 'head_dim')) == PartitionSpec(None, 'tensor', None)
    assert spec_for(('kv_heads',)) == PartitionSpec('tensor')


def test_rules_name_mesh_axes() -> None:
    with pytest.raises(InputError, match=r"logical axis 'mlp' .* received \('model',\)"):
        LogicalRules(mlp=('model',))
    with pytest.raises(InputError, match="received 'tensor'"):
        LogicalRules(mlp='tensor')  # type: ignore[arg-type]


def test_unknown_logical_axis_names_the_parameter() -> None:
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(InputError, match=r"params/table .*unknown logical axis 'vocabulary'"):
        variable_shardings(OneMatrix((16, 8), ('vocabulary', 'embed')), mesh)


def test_two_logical_axes_on_one_mesh_axis_name_the_parameter() -> None:
    mesh = make_mesh(MeshConfig(tensor=8))
    with pytest.raises(InputError, match=r"params/table .*'vocab' and 'mlp' on mesh axis 'tensor'"):
        variable_shardings(OneMatrix((16, 8), ('vocab', 'mlp')), mesh)
    colliding = dataclasses.replace(DEFAULT_RULES, embed=('data', 'tensor'))
    with pytest.raises(InputError, match=r"params/table .*'vocab' and 'embed'"):
        variable_shardings(OneMatrix((16, 8), ('vocab', 'embed')), mesh, colliding)


def test_indivisible_dimension_names_the_parameter() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    with pytest.raises(InputError, match=r"params/table .*dimension 0 \('vocab', size 18\).* 4,"):
        variable_shardings(OneMatrix((18, 8), ('vocab', 'embed')), mesh)
    over_both = dataclasses.replace(DEFAULT_RULES, vocab=('tensor', 'fsdp'), embed=())
    with pytest.raises(InputError, match=r"params/table .*dimension 0 \('vocab', size 12\).* 8,"):
        variable_shardings(OneMatrix((12, 8), ('vocab', 'embed')), mesh, over_both)


def test_parameter_without_names_is_refused_not_replicated() -> None:
    with pytest.raises(InputError, match=r'params/table .*no logical axes'):
        logical_axes(OneMatrix((16, 8), None))


def test_too_few_names_name_the_parameter() -> None:
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(InputError, match=r'params/table .*needs 2 logical axes'):
        variable_shardings(OneMatrix((16, 8), ('vocab',)), mesh)


def test_small_module_is_split_as_the_rules_say() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    model = OneMatrix((16, 8), ('vocab', 'embed'), mesh)
    assert logical_axes(model) == {
        'params': {'table': ('vocab', 'embed')},
        'routing': {'bias': (None,)},
    }
    variables = init_sharded(model, jax.random.key(3), mesh)
    assert variables['params']['table'].sharding.spec == PartitionSpec('tensor', 'fsdp')
    assert variables['params']['table'].addressable_shards[0].data.shape == (4, 4)
    assert variables['routing']['bias'].sharding.is_fully_replicated
    alone = OneMatrix((16, 8), ('vocab', 'embed'))
    expected = jax.jit(lambda key: nn.unbox(alone.init(key, jnp.zeros((1, 1), jnp.int32))))(
        jax.random.key(3)
    )
    np.testing.assert_allclose(variables['params']['table'], expected['params']['table'], rtol=1e-6)


def test_constrain_splits_the_batch() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    x = jnp.arange(8 * 3 * 2.0).reshape(8, 3, 2)
    axes = ('batch', 'length', None)
    split = jax.jit(lambda x: constrain(2 * x, axes, mesh))(x)
    np.testing.assert_array_equal(split, 2 * x)
    assert {shard.data.shape for shard in split.addressable_shards} == {(1, 3, 2)}
    assert constrain(x, axes, None) is x


def test_constrain_refuses_a_batch_that_does_not_divide() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    with pytest.raises(InputError, match=r"Activation .*dimension 0 \('batch', size 6\).* 8,"):
        jax.jit(lambda x: constrain(x, ('batch',), mesh))(jnp.zeros(6))


def test_batch_sharding_splits_rows_and_copies_over_tensor() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    placed = jax.device_put(np.arange(12).reshape(4, 3), batch_sharding(mesh))
    rows = sorted(tuple(shard.data[:, 0].tolist()) for shard in placed.addressable_shards)
    assert rows == [(0,), (0,), (3,), (3,), (6,), (6,), (9,), (9,)]


def test_sharding_for_keeps_whole_dimensions() -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))
    assert sharding_for((7, 16), (None, 'embed'), mesh).shard_shape((7, 16)) == (7, 2)


def by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}


@pytest.mark.parametrize('scan_layers', [True, False])
def test_transformer_axes(scan_layers: bool) -> None:
    axes = by_path(logical_axes(Transformer(config(scan_layers=scan_layers))))
    layers = ('layers',) if scan_layers else ()
    expected = {
        'embed/embedding': ('vocab', 'embed'),
        'head/kernel': ('embed', 'vocab'),
        'attention/q': (*layers, 'embed', 'heads', 'head_dim'),
        'attention/k': (*layers, 'embed', 'kv_heads', 'head_dim'),
        'attention/v': (*layers, 'embed', 'kv_heads', 'head_dim'),
        'attention/o': (*layers, 'heads', 'head_dim', 'embed'),
        'moe/gate_up': (*layers, 'experts', 'embed', None, 'mlp'),
        'moe/down': (*layers, 'experts', 'mlp', 'embed'),
        'router/kernel': (*layers, 'embed', None),
        'shared/down': (*layers, 'mlp', 'embed'),
        'mlp/gate_up': (*layers, 'embed', None, 'mlp'),
        'mlp/down': (*layers, 'mlp', 'embed'),
    }
    for ending, names in expected.items():
        found = {leaf for path, leaf in axes.items() if path.endswith(ending)}
        assert found == {names}, ending
    replicated = {path for path, names in axes.items() if not set(names) - {None, 'layers'}}
    assert all(path.endswith(('scale', 'selection_bias')) for path in replicated), replicated


def test_transformer_is_initialized_as_on_one_device() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    key = jax.random.key(0)
    experts = dataclasses.replace(config().moe, first_dense_layers=0, shared_dim=0)
    small = config(num_layers=1, moe=experts, tie_embeddings=True)
    sharded = init_sharded(Transformer(small, mesh), key, mesh)
    alone = nn.unbox(jax.jit(Transformer(small).init)(key, jnp.zeros((1, 1), jnp.int32)))
    assert jax.tree.structure(sharded) == jax.tree.structure(alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sharded, alone)
    whole = [x for x in jax.tree.leaves(sharded['params']) if x.sharding.is_fully_replicated]
    assert max(x.size for x in whole) <= 16, 'only scales of norms are replicated'
    assert jax.tree.map(lambda x: (x.shape, x.dtype), alone) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_variables(Transformer(small, mesh))
    )


def test_transformer_that_does_not_divide_names_the_parameter() -> None:
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with pytest.raises(InputError, match=r"attention/k .*\('kv_heads', size 2\) must be .* 4,"):
        variable_shardings(Transformer(config(), mesh), mesh)
