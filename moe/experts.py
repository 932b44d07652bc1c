"""The mixture-of-experts layer: router, routed experts and an optional shared one."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import Activation, DType, MoEConfig, RouterConfig
from moe.dispatch import dispatch
from moe.expert_parallel import expert_parallel_dispatch
from moe.layers import GatedMLP, kernel_init
from moe.routing import expert_load, route
from moe.types import RouterOutput

# Typed as Any: `param` hands the value back without the box that this puts it in.
_partitioned: Any = nn.with_logical_partitioning


class Router(nn.Module):
    """Scores the experts for each token and chooses among them, in float32 throughout.

    Attributes:
        config: the router as data.
        param_dtype: of the stored kernel.
    """

    config: RouterConfig
    param_dtype: DType = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T D']
    ) -> tuple[Float[Array, 'B T E'], Int[Array, 'B T K'], Float[Array, 'B T K']]:
        """Returns the logits, the chosen experts and their weights; see `moe.routing.route`."""
        experts = self.config.num_experts
        kernel = self.param(
            'kernel',
            _partitioned(kernel_init(0, 1), ('embed', None)),
            (x.shape[-1], experts),
            self.param_dtype,
        )
        logits = jnp.einsum(
            'btd,de->bte',
            x.astype(jnp.float32),
            kernel.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        bias = None
        if self.config.selection_bias:
            bias = self.variable(
                'routing', 'selection_bias', jnp.zeros, (experts,), jnp.float32
            ).value
        return logits, *route(logits, self.config, selection_bias=bias)


class MoELayer(nn.Module):
    """Replaces a gated MLP by `E` routed experts of which each token passes `K`.

    Parameters: `router/kernel` [D, E]; `gate_up` [E, D, 2, F] (gate first) and `down` [E, F, D];
    those of the shared expert under `shared`. Where the router has a selection bias, the collection
    `routing` holds it as `router/selection_bias` [E], float32.

    Attributes:
        config: router, widths and dispatch.
        activation: of the gates.
        dtype: of the experts' products; the router computes in float32.
        param_dtype: of the stored weights.
        mesh: where given, the experts run under `shard_map` over it.
    """

    config: MoEConfig
    activation: Activation
    dtype: DType = 'float32'
    param_dtype: DType = 'float32'
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T D'], mask: Bool[Array, 'B T']
    ) -> tuple[Float[Array, 'B T D'], RouterOutput]:
        """Routes every unmasked token.

        Args:
            x: tokens.
            mask: False is not routed and not counted, and its output is zero.

        Returns:
            The outputs, in `dtype`, and what the router decided.
        """
        router = Router(self.config.router, self.param_dtype, name='router')
        logits, ids, weights = router(x)
        gate_up, down = self._expert_weights(x.shape[-1])
        operands = (x.astype(self.dtype), ids, weights, mask, gate_up, down)
        settings = {
            'method': self.config.dispatch,
            'activation': self.activation,
            'capacity_factor': self.config.capacity_factor,
        }
        if self.mesh is None:
            y, dropped = dispatch(*operands, **settings)
        else:
            y, dropped = expert_parallel_dispatch(*operands, mesh=self.mesh, **settings)
        if self.config.shared_dim:
            shared = GatedMLP(
                self.config.shared_dim,
                self.activation,
                self.dtype,
                self.param_dtype,
                self.mesh,
                name='shared',
            )
            y = y + jnp.where(mask[..., None], shared(x), 0)
        load = expert_load(ids, mask, self.config.router.num_experts)
        return y, RouterOutput(logits, ids, weights, load, dropped)

    def _expert_weights(self, dim: int) -> tuple[Array, Array]:
        experts, hidden = self.config.router.num_experts, self.config.expert_dim
        gate_up = self.param(
            'gate_up',
            _partitioned(kernel_init(1, (2, 3), (0,)), ('experts', 'embed', None, 'mlp')),
            (experts, dim, 2, hidden),
            self.param_dtype,
        )
        down = self.param(
            'down',
            _partitioned(kernel_init(1, 2, (0,)), ('experts', 'mlp', 'embed')),
            (experts, hidden, dim),
            self.param_dtype,
        )
        return gate_up.astype(self.dtype), down.astype(self.dtype)
