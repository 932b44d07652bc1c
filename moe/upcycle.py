"""Dense to mixture of experts: every expert a copy, or a slice of a copy, of the dense MLP."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from moe.config import MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.mtp_surgery import refuse_modules
from moe.routing import route
from moe.sharding import abstract_variables
from moe.transformer import Transformer
from moe.unstacked import Tree, join_layers, relaid, split_layers, unrolled

PROBES = 256
TOLERANCE = 1e-5


def upcycle(
    config: TransformerConfig,
    params: Tree,
    moe: MoEConfig,
    *,
    key: PRNGKeyArray,
    noise: float = 0.0,
    router_std: float = 0.02,
    directions: Sequence[Float[Array, 'C D']] | None = None,
) -> tuple[TransformerConfig, Tree, Tree]:
    """Turns the MLPs of a dense model into experts; without noise the logits stay the same.

    The first `shared_dim` hidden units of an MLP become the shared expert. The rest is cut into
    `G = (mlp_dim - shared_dim) / expert_dim` slices, each copied `C = E / G` times: expert
    `c * G + g` is copy c of slice g. The G experts of one copy, a virtual group, start with one
    router column, so a token chooses whole groups, and

        sum_k w_k expert_k(x) = (weight that each slice receives) * mlp(x);

    the experts' `down` is divided by that weight. G = 1 is plain upcycling.

    Equality holds on dropless dispatch ('dense', 'grouped'); 'capacity' drops tokens, and with
    `router_std=0`, where every token ties for the first experts, many.

    Args:
        config: of the dense model.
        params: its unboxed `params`, stacked or not.
        moe: the experts and the layers that get them.
        key: draws the router columns and the noise.
        noise: standard deviation of Gaussian noise on the routed experts, relative to that of each
            weight; breaks the symmetry of the copies, and the equality.
        router_std: of the router's weights; 0 gives all experts the same score, always.
        directions: for each MoE layer the directions of its router's columns, of unit length, such
            as `moe.centroids.input_centroids`; None draws them.

    Returns:
        The new config, `params` in its layout, and the `routing` collection (zero biases).

    Raises:
        InputError: for a model that has experts already, widths that do not divide, and a router
            whose weights cannot add up to the dense MLP; the last names the nearest that can.

    Source: sparse upcycling, arXiv 2212.05055; virtual groups and weight scaling, arXiv 2410.07524.
        There all weights share the scaling; here `down` alone bears it.
    """
    granularity, received = require_upcyclable(config, moe, noise=noise, router_std=router_std)
    target = dataclasses.replace(config, moe=moe)
    # Biases, where the spec has any, start at zero.
    shell = abstract_variables(Transformer(unrolled(target)))
    layers, rest = split_layers(config, params)
    for n, i in enumerate(np.flatnonzero(target.moe_layers)):
        router_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        zeros = _zeros(shell['params'][f'layer_{i}']['moe'])
        if directions is None:
            shape = (config.embed_dim, moe.router.num_experts // granularity)
            columns = jax.random.normal(router_key, shape)
        else:
            columns = config.embed_dim**0.5 * directions[n].T
        router = _router(zeros['router'], granularity, router_std * columns)
        experts = _experts(layers[i]['mlp'], moe, granularity, received)
        experts = {**zeros, **experts, **_noisy(experts, noise_key, noise), 'router': router}
        kept = {name: value for name, value in layers[i].items() if name != 'mlp'}
        layers[i] = {**kept, 'moe': experts}
    routing = relaid(unrolled(target), target, _zeros(shell.get('routing', {})))
    return target, join_layers(target, layers, rest), routing


def require_upcyclable(
    config: TransformerConfig, moe: MoEConfig, *, noise: float, router_std: float
) -> tuple[int, float]:
    """Refuses what `upcycle` cannot make equal to the dense model.

    Returns:
        The slices of one MLP, and the weight that each receives.

    Raises:
        InputError: as `upcycle`.
    """
    if config.moe is not None:
        raise InputError(
            f'upcycle needs a dense model; this one has experts in {sum(config.moe_layers)} of '
            f'{config.num_layers} layers. Make it dense first, with concatenate_experts.'
        )
    refuse_modules(config)
    if noise < 0 or router_std < 0:
        raise InputError(
            f'noise and router_std must be zero or more; received {noise} and {router_std}.'
        )
    if not moe.router.causal:
        raise InputError(
            'The weights of a token must not hang on the other tokens, or its logits cannot stay: '
            f"upcycle needs moe.router.choice='token'; received {moe.router.choice!r}."
        )
    granularity = slices_of(config.mlp_dim, moe)
    received = received_weight(moe.router, granularity, tied=router_std == 0)
    if received is None:
        raise InputError(_refusal(moe.router, granularity, router_std))
    return granularity, received


def slices_of(mlp_dim: int, moe: MoEConfig) -> int:
    """Returns `G`, the slices of one MLP that its routed experts are.

    Raises:
        InputError: where expert_dim does not divide what the shared expert leaves of `mlp_dim`, or
            `G` does not divide the number of experts.
    """
    routed = mlp_dim - moe.shared_dim
    if routed < moe.expert_dim or routed % moe.expert_dim:
        raise InputError(
            f'mlp_dim - moe.shared_dim = {mlp_dim} - {moe.shared_dim} must be a positive multiple '
            f'of moe.expert_dim; received {moe.expert_dim}. Choose an expert_dim that divides.'
        )
    slices = routed // moe.expert_dim
    experts = moe.router.num_experts
    if experts % slices:
        nearest = max(1, round(experts / slices)) * slices
        raise InputError(
            f'moe.router.num_experts must be a multiple of {slices}, the slices of width '
            f'{moe.expert_dim} of one MLP; received {experts}. The nearest is {nearest}.'
        )
    return slices


def received_weight(router: RouterConfig, slices: int, *, tied: bool) -> float | None:
    """Returns the weight that each slice of the MLP receives, if it is one for all tokens.

    Routes random logits, equal within a virtual group, and adds up each slice's weights: what holds
    for the spec, whatever its fields, shows in what it does.

    Args:
        router: the spec.
        slices: `G`.
        tied: whether all logits are zero.

    Returns:
        The common weight, or None where slices or tokens differ, or no weight arrives.
    """
    copies = router.num_experts // slices
    logits = 0 if tied else 1
    logits = logits * jax.random.normal(jax.random.key(0), (1, PROBES, copies))
    logits = jnp.repeat(logits, slices, axis=-1)
    ids, weights = route(logits, router, tokens=jnp.arange(PROBES)[None])
    of_slice = np.asarray(ids)[..., None] % slices == np.arange(slices)
    received = np.where(of_slice, np.asarray(weights)[..., None], 0.0).sum(axis=2)
    mean = float(received.mean())
    constant = np.abs(received - mean).max() <= TOLERANCE * mean
    return mean if mean > 0 and constant else None


def _refusal(router: RouterConfig, slices: int, router_std: float) -> str:
    """Says that the spec cannot equal the dense model, and which fewest changes can."""
    k, most = router.experts_per_token, router.num_experts
    multiples = sorted(range(slices, most + 1, slices), key=lambda m: (m != k, abs(m - k), m))
    stds = (router_std, 0.0) if router_std else (0.0,)
    choices = itertools.product(
        dict.fromkeys((router.normalize, 'after')), stds, (k, *multiples[:1], most)
    )
    found = []
    for normalize, std, count in choices:
        changes = {
            'moe.router.normalize': (router.normalize, normalize),
            'moe.router.experts_per_token': (k, count),
            'router_std': (router_std, std),
        }
        changed = [f'{name}={new!r}' for name, (old, new) in changes.items() if new != old]
        spec = dataclasses.replace(router, normalize=normalize, experts_per_token=count)
        if received_weight(spec, slices, tied=std == 0) is not None:
            found.append((len(changed), abs(count - k), ', '.join(changed)))
    nearest = min(found)[2] if found else "moe.router.choice='token'"
    return (
        f'The upcycled model must equal the dense one at step 0: each of the {slices} slices of an '
        f'MLP must receive the same weight for every token. With choice={router.choice!r}, '
        f'score={router.score!r}, '
        f'normalize={router.normalize!r}, experts_per_token={k} of {most} and '
        f'router_std={router_std} it does not. The nearest that can: {nearest}.'
    )


def _experts(mlp: Tree, moe: MoEConfig, slices: int, received: float) -> Tree:
    """Cuts one MLP into the shared expert and `copies` times `slices` routed ones."""
    gate_up, down = mlp['gate_up'], mlp['down']
    shared, copies = moe.shared_dim, moe.router.num_experts // slices
    cut = gate_up[..., shared:].reshape(*gate_up.shape[:2], slices, moe.expert_dim)
    experts: Tree = {
        'gate_up': jnp.tile(jnp.moveaxis(cut, 2, 0), (copies, 1, 1, 1)),
        'down': jnp.tile(down[shared:].reshape(slices, moe.expert_dim, -1), (copies, 1, 1)),
    }
    experts['down'] = experts['down'] / jnp.asarray(received, down.dtype)
    if shared:
        experts['shared'] = {'gate_up': gate_up[..., :shared], 'down': down[:shared]}
    return experts


def _noisy(experts: Tree, key: PRNGKeyArray, noise: float) -> Tree:
    """Adds noise to the routed experts, of `noise` times each array's own standard deviation."""
    if not noise:
        return {}
    keys = dict(zip(('gate_up', 'down'), jax.random.split(key), strict=True))
    return {name: _with_noise(experts[name], each, noise) for name, each in keys.items()}


def _with_noise(x: Float[Array, '...'], key: PRNGKeyArray, noise: float) -> Float[Array, '...']:
    wide = x.astype(jnp.float32)
    return (wide + noise * wide.std() * jax.random.normal(key, x.shape)).astype(x.dtype)


def _router(zeros: Tree, slices: int, columns: Float[Array, 'D C']) -> Tree:
    """Gives the experts of each virtual group one column."""
    kernel = jnp.repeat(columns, slices, axis=1).astype(zeros['kernel'].dtype)
    return {**zeros, 'kernel': kernel}


def _zeros(shell: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shell)
