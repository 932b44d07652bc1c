"""Tiny models of every family, as keyword arguments of their `transformers` config classes."""

from typing import Any

BASE = {
    'vocab_size': 61,
    'hidden_size': 24,
    'intermediate_size': 40,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'pad_token_id': None,
    'bos_token_id': None,
    'eos_token_id': None,
}
# Every matrix square, and every width the same: a transposition changes no shape.
SQUARE = {
    'hidden_size': 16,
    'intermediate_size': 16,
    'num_attention_heads': 2,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'vocab_size': 16,
}
LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 5e5,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
# The ramp between kept and stretched channels falls inside these heads.
YARN = {
    'rope_type': 'yarn',
    'rope_theta': 1e4,
    'factor': 8.0,
    'original_max_position_embeddings': 16,
    'beta_fast': 4.0,
    'beta_slow': 1.0,
}
QWEN_MOE = {'moe_intermediate_size': 12, 'num_experts': 6, 'num_experts_per_tok': 2}
LATENT = {
    'kv_lora_rank': 10,
    'q_lora_rank': 14,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 5,
    'num_key_value_heads': 4,
    'moe_intermediate_size': 12,
    'n_routed_experts': 8,
    'n_shared_experts': 1,
    'num_experts_per_tok': 3,
    'n_group': 1,
    'topk_group': 1,
    'first_k_dense_replace': 1,
    'num_hidden_layers': 3,
    'num_nextn_predict_layers': 0,
}
OSS = {
    'num_local_experts': 5,
    'num_experts_per_tok': 2,
    'head_dim': 8,
    'sliding_window': 3,
    'rope_parameters': YARN | {'rope_theta': 150_000.0, 'truncate': False},
}
GEMMA = {'head_dim': 8, 'sliding_window': 4, 'query_pre_attn_scalar': 8}
GEMMA3_ROPE = {
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e3},
    'full_attention': {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 4.0},
}

# Of each family: the name that its classes begin with, and its models.
MODELS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    'llama': (
        'Llama',
        {
            'llama3': {'rope_parameters': LLAMA3, 'tie_word_embeddings': True},
            'biases': {'attention_bias': True, 'num_key_value_heads': 1, 'vocab_size': 53},
            'square': SQUARE,
            'wide-heads': {'head_dim': 10, 'rope_parameters': YARN},
        },
    ),
    'qwen2': (
        'Qwen2',
        {
            'tied': {'tie_word_embeddings': True},
            'window': {
                'use_sliding_window': True,
                'sliding_window': 4,
                'max_window_layers': 1,
                'num_hidden_layers': 3,
            },
            'square': {name: size for name, size in SQUARE.items() if name != 'head_dim'},
        },
    ),
    'qwen3': (
        'Qwen3',
        {
            'plain': {'head_dim': 10},
            'yarn': {'head_dim': 8, 'rope_parameters': YARN, 'tie_word_embeddings': True},
            'biases': {'head_dim': 6, 'attention_bias': True, 'hidden_size': 20},
        },
    ),
    'gemma': (
        'Gemma',
        {
            'tied': {'head_dim': 8, 'num_key_value_heads': 1},
            'biases': {'head_dim': 10, 'attention_bias': True},
        },
    ),
    'gemma2': (
        'Gemma2',
        {
            'caps': GEMMA | {'final_logit_softcapping': 3.0, 'attn_logit_softcapping': 2.0},
            'no-caps': GEMMA
            | {'final_logit_softcapping': None, 'attn_logit_softcapping': None}
            | {'query_pre_attn_scalar': 5, 'num_hidden_layers': 3},
        },
    ),
    'gemma3_text': (
        'Gemma3',
        {
            'ropes': GEMMA | {'rope_parameters': GEMMA3_ROPE, 'num_hidden_layers': 7},
            'scalar': GEMMA | {'query_pre_attn_scalar': 6, 'num_key_value_heads': 1},
        },
    ),
    'mixtral': (
        'Mixtral',
        {
            'plain': {'num_local_experts': 5, 'num_experts_per_tok': 2},
            'top1': {'num_local_experts': 3, 'num_experts_per_tok': 1, 'sliding_window': 4},
            'square': SQUARE | {'num_local_experts': 16, 'num_experts_per_tok': 3},
        },
    ),
    'olmoe': (
        'Olmoe',
        {
            'plain': {'num_experts': 6, 'num_experts_per_tok': 3},
            'clipped': {
                'num_experts': 4,
                'num_experts_per_tok': 2,
                'clip_qkv': 0.5,
                'norm_topk_prob': True,
                'num_key_value_heads': 4,
            },
        },
    ),
    'qwen3_moe': (
        'Qwen3Moe',
        {
            'normed': QWEN_MOE | {'head_dim': 8, 'norm_topk_prob': True},
            'mixed': QWEN_MOE
            | {'head_dim': 10, 'mlp_only_layers': [1], 'num_hidden_layers': 4}
            | {'tie_word_embeddings': True},
            'stepped': QWEN_MOE
            | {'head_dim': 6, 'decoder_sparse_step': 2, 'num_hidden_layers': 4}
            | {'attention_bias': True, 'rope_parameters': YARN},
        },
    ),
    'deepseek_v3': (
        'DeepseekV3',
        {
            'groups': LATENT | {'n_group': 4, 'topk_group': 2, 'routed_scaling_factor': 2.5},
            'yarn': LATENT
            | {'rope_parameters': YARN | {'mscale': 1.0, 'mscale_all_dim': 0.7}}
            | {'n_shared_experts': 2, 'norm_topk_prob': False},
            'no-query-latent': LATENT
            | {'q_lora_rank': None, 'first_k_dense_replace': 0, 'rms_norm_eps': 1e-3},
            'dense': LATENT | {'first_k_dense_replace': 3},
        },
    ),
    'gpt_oss': (
        'GptOss',
        {
            'plain': OSS,
            'square': OSS | SQUARE | {'hidden_size': 16, 'num_local_experts': 2},
            'odd': OSS | {'num_hidden_layers': 3, 'hidden_size': 20, 'num_attention_heads': 6},
        },
    ),
}
CASES = [(family, name) for family, (_, models) in MODELS.items() for name in models]
FIRST = [(family, next(iter(models))) for family, (_, models) in MODELS.items()]
