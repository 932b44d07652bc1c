"""The layer that others train on a CPU: `transformers`' grouped experts, in torch.

Both are in the extra `hf-test`, and imported where they are used.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moe.processors import processors


def missing() -> tuple[str, ...]:
    """Returns which of the modules that this one needs are not installed."""
    return tuple(name for name in ('torch', 'transformers') if not importlib.util.find_spec(name))


def _modules() -> tuple[Any, Any]:
    """Imports what may not be installed."""
    return importlib.import_module('torch'), importlib.import_module('transformers')


def conditions() -> str:
    """Says what is measured, with versions."""
    torch, transformers = _modules()
    return (
        f"transformers {transformers.__version__} Qwen3MoeSparseMoeBlock, 'grouped_mm' experts, "
        f'torch {torch.__version__}, {torch.get_num_threads()} threads'
    )


def steps(params: Mapping[str, Any], x: jax.Array, k: int) -> dict[str, Callable[[], Any]]:
    """Returns the same layer and a dense gated MLP of its active FLOPs, in torch.

    Torch is given as many threads as this process may use, which is what JAX takes.

    Args:
        params: of a `moe.MoELayer` whose router normalises its softmax after the choice.
        x: the input, [B, T, D] float32.
        k: experts of a token.

    Returns:
        'transformers' and 'torch_mlp': functions that compute the output, and the gradients of the
        input and of every parameter, as a list.
    """
    torch, _ = _modules()
    torch.set_num_threads(processors())
    _, hidden, dim = params['down'].shape
    block = _block(params, k)
    torch.manual_seed(0)
    mlp = _gated_mlp(dim, k * hidden)
    cotangent = jax.random.normal(jax.random.key(2), x.shape)
    inputs = [torch.tensor(np.asarray(array)) for array in (x, cotangent)]
    return {'transformers': _step(block, *inputs), 'torch_mlp': _step(mlp, *inputs)}


def _step(module: Any, x: Any, cotangent: Any) -> Callable[[], list[Any]]:
    torch, _ = _modules()
    x = x.clone().requires_grad_()
    parameters = list(module.parameters())

    def step() -> list[Any]:
        y = module(x)
        return [y, *torch.autograd.grad(y, [x, *parameters], cotangent)]

    return step


def _block(params: Mapping[str, Any], k: int) -> Any:
    """Builds the MoE block with our weights: [E, D, 2, F] becomes [E, 2 F, D], down [E, D, F]."""
    torch, transformers = _modules()
    modeling = importlib.import_module('transformers.models.qwen3_moe.modeling_qwen3_moe')
    experts, hidden, dim = params['down'].shape
    config = transformers.Qwen3MoeConfig(
        hidden_size=dim,
        moe_intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=k,
        norm_topk_prob=True,
        hidden_act='silu',
    )
    config._experts_implementation = 'grouped_mm'
    block = modeling.Qwen3MoeSparseMoeBlock(config)
    gate_up = np.asarray(params['gate_up']).reshape(experts, dim, -1)
    values = {
        'gate.weight': np.asarray(params['router']['kernel']).T,
        'experts.gate_up_proj': gate_up.swapaxes(1, 2),
        'experts.down_proj': np.asarray(params['down']).swapaxes(1, 2),
    }
    state = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in values.items()}
    block.load_state_dict(state, assign=True)
    return block.requires_grad_()


def _gated_mlp(dim: int, hidden: int) -> Any:
    torch, _ = _modules()

    class GatedMLP(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = torch.nn.Linear(dim, 2 * hidden, bias=False)
            self.down = torch.nn.Linear(hidden, dim, bias=False)

        def forward(self, x: Any) -> Any:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(torch.nn.functional.silu(gate) * up)

    return GatedMLP()
