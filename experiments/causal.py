"""Models of a study read from left to right."""

from moe.config import TransformerConfig
from moe.routing import require_causal


def require_left_to_right(model: TransformerConfig) -> None:
    """Refuses a model whose routers look at later tokens.

    Raises:
        InputError: as `moe.routing.require_causal`.
    """
    if model.moe is not None:
        require_causal(model.moe.router, 'A study, which compares models that read left to right,')
