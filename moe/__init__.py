"""Mixture-of-experts decoders in JAX: configs, models, routing, sharding, decoding, accounting."""

from moe.accounting import bytes_per_token, flops_per_token, parameter_report
from moe.attention_kinds import empty_cache
from moe.balance import (
    load_balance_loss,
    load_statistics,
    router_confidence,
    router_z_loss,
    updated_bias,
)
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    LinearScaling,
    Llama3Scaling,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
    YarnScaling,
)
from moe.convert import family_of, load_pretrained, pretrained_config, save_pretrained
from moe.decode import Written, generate, write
from moe.drafts import ModelDraft, PromptLookup
from moe.engine import Engine
from moe.errors import InputError
from moe.expert_weights import split_experts, stack_experts
from moe.experts import MoELayer
from moe.look_ahead import empty_module_cache, predict_ahead
from moe.module_draft import ModuleDraft
from moe.presets import preset
from moe.replay import load_routing, save_routing
from moe.requests import EngineConfig, QueueFullError, Request
from moe.routing import route
from moe.sampling import Sampling
from moe.selection_bias import update_selection_bias
from moe.sharding import MeshConfig, make_mesh, variable_shardings
from moe.speculate import speculate
from moe.transformer import Transformer, output_head
from moe.types import KVCache, ModelOutput, RouterOutput

__all__ = [
    'AttentionConfig',
    'Engine',
    'EngineConfig',
    'InputError',
    'KVCache',
    'LatentAttentionConfig',
    'LinearAttentionConfig',
    'LinearScaling',
    'Llama3Scaling',
    'MeshConfig',
    'MoEConfig',
    'MoELayer',
    'ModelDraft',
    'ModelOutput',
    'ModuleDraft',
    'PromptLookup',
    'QueueFullError',
    'Request',
    'RouterConfig',
    'RouterOutput',
    'Sampling',
    'Transformer',
    'TransformerConfig',
    'Written',
    'YarnScaling',
    'bytes_per_token',
    'empty_cache',
    'empty_module_cache',
    'family_of',
    'flops_per_token',
    'generate',
    'load_balance_loss',
    'load_pretrained',
    'load_routing',
    'load_statistics',
    'make_mesh',
    'output_head',
    'parameter_report',
    'predict_ahead',
    'preset',
    'pretrained_config',
    'route',
    'router_confidence',
    'router_z_loss',
    'save_pretrained',
    'save_routing',
    'speculate',
    'split_experts',
    'stack_experts',
    'update_selection_bias',
    'updated_bias',
    'variable_shardings',
    'write',
]
