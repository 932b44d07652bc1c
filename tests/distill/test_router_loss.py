import jax.numpy as jnp
import numpy as np

from distill.config import BalanceConfig
from distill.router_loss import router_loss
from moe.routing import expert_load
from moe.types import RouterOutput

MASK = jnp.array([[True, True], [True, False]])


def layer(scores: list, ids: list) -> RouterOutput:
    expert_ids = jnp.array(ids)[..., None]
    load = expert_load(expert_ids, MASK, 2)
    logits = jnp.log(jnp.array(scores))
    return RouterOutput(logits, expert_ids, jnp.ones((2, 2, 1)), load, jnp.zeros(()))


LAYERS = (
    layer([[[0.75, 0.25], [0.75, 0.25]], [[0.5, 0.5], [0.1, 0.9]]], [[0, 0], [1, 0]]),
    layer([[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]], [[0, 1], [0, 1]]),
)


def test_layers_are_weighed_and_averaged_by_hand():
    balance = BalanceConfig(load_balance_weight=0.5, load_balance_scope='global')
    load = jnp.array([[1.0, 3.0], [2.0, 2.0]])
    result = router_loss(LAYERS, (MASK, MASK), balance, score='softmax', load=load)
    # Scores sum to (2, 1) and (1.5, 1.5); shares are (1/4, 3/4) and (1/2, 1/2); twice, for E = 2.
    first, second = 2 * (2 / 4 + 3 / 4), 2 * 1.5
    np.testing.assert_allclose(result.pairs['load_balance_loss'], [first + second, 6], rtol=1e-6)
    np.testing.assert_allclose(result.loss, 0.5 * (first + second) / 2, rtol=1e-6)
    np.testing.assert_allclose(result.confidence, [[0.75 + 0.75 + 0.5, 1.5], [3, 3]], rtol=1e-6)


def test_the_z_loss_is_of_unmasked_tokens():
    shifted = tuple(
        router.replace(router_logits=router.router_logits + jnp.array([[[2.0], [0]], [[0], [9]]]))
        for router in LAYERS
    )
    balance = BalanceConfig(router_z_weight=0.1)
    result = router_loss(shifted, (MASK, MASK), balance, score='softmax')
    np.testing.assert_allclose(result.pairs['router_z_loss'], [4 + 4, 6], rtol=1e-5)
    np.testing.assert_allclose(result.loss, 0.1 * 8 / 2, rtol=1e-5)


def test_every_router_has_its_own_mask():
    balance = BalanceConfig(router_z_weight=1.0)
    logits = [jnp.array([[[1.0], [2]], [[4], [8]]]), jnp.array([[[1.0], [2]], [[4], [8]]])]
    routers = [router.replace(router_logits=x) for router, x in zip(LAYERS, logits, strict=True)]
    one = jnp.array([[False, True], [False, False]])
    result = router_loss(routers, (MASK, one), balance, score='softmax')
    np.testing.assert_allclose(result.pairs['router_z_loss'], [1 + 4 + 16 + 4, 3 + 1], rtol=1e-6)
    np.testing.assert_allclose(result.confidence[1], [3, 1])
