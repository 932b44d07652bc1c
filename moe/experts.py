"""The mixture-of-experts layer: router, routed experts and an optional shared one."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import Activation, DType, MoEConfig
from moe.dispatch import ExpertBiases, dispatch
from moe.errors import InputError
from moe.expert_parallel import expert_parallel_dispatch
from moe.expert_weights import stack_experts
from moe.layers import GatedMLP, kernel_init, partitioned
from moe.quantised import Kernel, Quantised, dequantised, stored_kernel
from moe.routing import RouterConfig, expert_load, route, weigh
from moe.soft_moe import soft_dispatch
from moe.types import RouterOutput


class Router(nn.Module):
    """Computes each token's logits for the experts, in float32 throughout.

    Attributes:
        config: the router as data.
        param_dtype: of the stored kernel and bias.
    """

    config: RouterConfig
    param_dtype: DType = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T D']
    ) -> tuple[Float[Array, 'B T E *slots'], Float[Array, 'E'] | None]:
        """Returns the logits, for every slot where routing is soft, and the selection bias."""
        config = self.config
        soft = config.choice == 'soft'
        outputs = (config.num_experts, config.slots) if soft else (config.num_experts,)
        axes = (None,) * len(outputs)
        init = partitioned(kernel_init(0, tuple(range(1, 1 + len(outputs)))), ('embed', *axes))
        kernel = self.param('kernel', init, (x.shape[-1], *outputs), self.param_dtype)
        logits = jnp.einsum(
            'btd,d...->bt...',
            x.astype(jnp.float32),
            kernel.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        if config.bias:
            init = partitioned(nn.initializers.zeros_init(), axes)
            logits += self.param('bias', init, outputs, self.param_dtype).astype(jnp.float32)
        bias = None
        if config.selection_bias:
            bias = self.variable('routing', 'selection_bias', jnp.zeros, outputs, jnp.float32).value
        return logits, bias


class Expert(nn.Module):
    """The parameters of one routed expert: `gate` and `up` [D, F] and `down` [F, D].

    Where configured also `gate_bias` and `up_bias` [F] and `down_bias` [D].

    Attributes:
        hidden_dim: `F`.
        bias: whether each projection adds one.
        param_dtype: of what is stored.
    """

    hidden_dim: int
    bias: bool
    param_dtype: DType

    @nn.compact
    def __call__(self, dim: int) -> Mapping[str, Array]:
        """Returns the parameters of an expert for inputs of width `D`."""
        into, out = ('embed', 'mlp'), ('mlp', 'embed')
        shapes = {
            'gate': ((dim, self.hidden_dim), into),
            'up': ((dim, self.hidden_dim), into),
            'down': ((self.hidden_dim, dim), out),
        }
        inits = dict.fromkeys(shapes, kernel_init(0, 1))
        if self.bias:
            biases = {
                f'{name}_bias': (shape[1:], axes[1:]) for name, (shape, axes) in shapes.items()
            }
            inits |= dict.fromkeys(biases, nn.initializers.zeros_init())
            shapes |= biases
        return {
            name: self.param(name, partitioned(inits[name], axes), shape, self.param_dtype)
            for name, (shape, axes) in shapes.items()
        }


class MoELayer(nn.Module):
    """Replaces a gated MLP by `E` routed experts of which each token passes `K`.

    Parameters: `router/kernel` [D, E]; `gate_up` [E, D, 2, F] (gate first) and `down` [E, F, D];
    those of the shared expert under `shared`; where configured, `router/bias` [E], `gate_up_bias`
    [E, 2, F] and `down_bias` [E, D]. A soft router's kernel and bias end with an axis of slots.
    Where the router has a selection bias, the collection `routing` holds it as
    `router/selection_bias` [E], float32. With `storage='per_expert'`, `expert_0` and so on hold
    what `moe.split_experts` returns in place of the arrays of all experts.

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
        self,
        x: Float[Array, 'B T D'],
        mask: Bool[Array, 'B T'],
        tokens: Int[Array, 'B T'] | None = None,
        replayed: Int[Array, 'B T K'] | None = None,
    ) -> tuple[Float[Array, 'B T D'], RouterOutput]:
        """Routes every unmasked token.

        Args:
            x: hidden states.
            mask: False is not routed and not counted, and its output is zero.
            tokens: the ids that `x` came from; needed where the router chooses by hash.
            replayed: the experts of each token, from a record; None lets the router choose.

        Returns:
            The outputs, in `dtype`, and what the router decided.

        Raises:
            InputError: where the router chooses by hash and there are no tokens.
        """
        noisy = self._jittered(x)
        logits, bias = Router(self.config.router, self.param_dtype, name='router')(noisy)
        y, output = self._routed(noisy.astype(self.dtype), logits, bias, mask, tokens, replayed)
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
        return y, output

    def _jittered(self, x: Array) -> Array:
        """Multiplies by the noise that router and routed experts see, where there is an rng."""
        jitter = self.config.router.jitter
        if jitter == 0 or not self.has_rng('jitter'):
            return x
        key = self.make_rng('jitter')
        return x * jax.random.uniform(key, x.shape, x.dtype, 1 - jitter, 1 + jitter)

    def _routed(
        self,
        x: Array,
        logits: Array,
        selection_bias: Array | None,
        mask: Array,
        tokens: Array | None,
        replayed: Array | None,
    ) -> tuple[Array, RouterOutput]:
        config, router = self.config, self.config.router
        gate_up, down, biases = self._expert_weights(x.shape[-1])
        if router.choice == 'soft':
            gate_up, down = (dequantised(each, x.dtype) for each in (gate_up, down))
            settings = {'activation': self.activation, 'scale': router.scale, 'biases': biases}
            return soft_dispatch(x, logits, mask, gate_up, down, **settings)
        if replayed is None:
            ids, weights = route(
                logits, router, selection_bias=selection_bias, mask=mask, tokens=tokens
            )
        else:
            ids, weights = replayed, weigh(logits, replayed, router)
        settings = {
            'method': config.dispatch,
            'activation': self.activation,
            'capacity_factor': config.capacity_factor,
            'biases': biases,
        }
        if self.mesh is None:
            y, dropped = dispatch(x, ids, weights, mask, gate_up, down, **settings)
        else:
            y, dropped = expert_parallel_dispatch(
                *(x, ids, weights, mask, gate_up, down),
                mesh=self.mesh,
                exchange_factor=config.exchange_factor,
                exchange_chunks=config.exchange_chunks,
                **settings,
            )
        load = expert_load(ids, mask, router.num_experts)
        return y, RouterOutput(logits, ids, weights, load, dropped)

    def _expert_weights(self, dim: int) -> tuple[Kernel, Kernel, ExpertBiases | None]:
        fused = self.config.storage == 'fused'
        params = self._fused_params(dim) if fused else self._separate_params(dim)
        params: dict[str, Any] = {
            name: value if isinstance(value, Quantised) else value.astype(self.dtype)
            for name, value in params.items()
        }
        biases = None
        if self.config.bias:
            biases = ExpertBiases(params['gate_up_bias'], params['down_bias'])
        return params['gate_up'], params['down'], biases

    def _fused_params(self, dim: int) -> dict[str, Any]:
        experts, hidden = self.config.router.num_experts, self.config.expert_dim
        params = {
            'gate_up': self._kernel(
                'gate_up',
                partitioned(kernel_init(1, (2, 3), (0,)), ('experts', 'embed', None, 'mlp')),
                (experts, dim, 2, hidden),
            ),
            'down': self._kernel(
                'down',
                partitioned(kernel_init(1, 2, (0,)), ('experts', 'mlp', 'embed')),
                (experts, hidden, dim),
            ),
        }
        if self.config.bias:
            zeros = nn.initializers.zeros_init()
            params['gate_up_bias'] = self.param(
                'gate_up_bias',
                partitioned(zeros, ('experts', None, 'mlp')),
                (experts, 2, hidden),
                self.param_dtype,
            )
            params['down_bias'] = self.param(
                'down_bias',
                partitioned(zeros, ('experts', 'embed')),
                (experts, dim),
                self.param_dtype,
            )
        return params

    def _kernel(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]
    ) -> Kernel:
        read = functools.partial(self.param, name, init, shape, self.param_dtype)
        return stored_kernel(self, name, read, len(shape) - 2, batch_axes=1)

    def _separate_params(self, dim: int) -> dict[str, Array]:
        if self.mesh is not None and self.mesh.shape['expert'] > 1:
            raise InputError(
                "moe.storage='per_expert' keeps every expert on every shard, and needs a mesh with "
                f"expert=1; received expert={self.mesh.shape['expert']}. Set moe.storage='fused', "
                'whose experts are split over it, or split their widths: fsdp and tensor.'
            )
        config = self.config
        return stack_experts(
            [
                Expert(config.expert_dim, config.bias, self.param_dtype, name=f'expert_{e}')(dim)
                for e in range(config.router.num_experts)
            ]
        )
