"""Figures of decoding beside the speed of memory, and beside `transformers` on the same model."""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distill.timing import interleaved_medians
from experiments.benchmark_row import Row, ratio_row, this_machine
from moe.accounting import parameter_report
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.decode import write
from moe.quantising import quantise
from moe.sampling import Sampling
from moe.transformer import Transformer

# About 32 million parameters a token passes, the head among them; 168 million in all.
CONFIG = TransformerConfig(
    vocab_size=16_384,
    num_layers=6,
    embed_dim=512,
    mlp_dim=512,
    attention=AttentionConfig(8, 4, 64, qk_norm='head', rope_theta=1e6),
    moe=MoEConfig(RouterConfig(32, 4), 512),
    scan_layers=False,
)
PROMPT, SHORT = 16, 8
MEASURED_BYTES = 2**28
READERS = 8  # rows, that several processors may share
FLOAT32, INT8 = 'fractional', 'fractional int8'


def decode_rows(
    *, config: TransformerConfig = CONFIG, tokens: int = 64, batch: int = 16, repeats: int = 5
) -> Iterator[Row]:
    """Measures tokens a second of greedy decoding, float32.

    A text of `8 + tokens` tokens less one of 8, both after a prompt of 16: what is left is decoding
    alone. At batch 1 the limit is one reading of the active weights for each token, at the speed at
    which this machine was seen to sum the rows of a large array in the same run.

    Args:
        config: the model; `transformers` builds the same as Qwen3-MoE.
        tokens: that are timed.
        batch: of the second figure.
        repeats: timed rounds; the median counts.

    Yields:
        Rows at batch 1: ours beside the limit, with matrices as integers of 8 bits beside our
        float32, and, where torch and transformers are installed, theirs beside the limit; and ours
        at `batch` beside theirs. Of their ways to run experts, the one that was fastest on a short
        text.
    """
    ours, theirs = our_writers(config), their_writers(config)
    array = jnp.ones((READERS, MEASURED_BYTES // 4 // READERS), jnp.float32)
    total = jax.jit(functools.partial(jnp.sum, axis=1))
    functions: dict[str, Callable[[], Any]] = {'bandwidth': lambda: total(array)}
    best = {rows: _fastest(theirs, rows) for rows in (1, batch)} if theirs else {}
    measured = [(FLOAT32, 1), (INT8, 1), (FLOAT32, batch), *((way, n) for n, way in best.items())]
    for name, rows in measured:
        for length in (SHORT, SHORT + tokens):
            writer = functools.partial((ours | theirs)[name], rows, length)
            functions[f'{name}/{rows}/{length}'] = writer
    seconds = interleaved_medians(functions, repeats=repeats)

    def rate(name: str, rows: int) -> float:
        long, short = (seconds[f'{name}/{rows}/{n}'] for n in (SHORT + tokens, SHORT))
        return rows * tokens / (long - short)

    active = 4 * _read_parameters(config)
    bandwidth = MEASURED_BYTES / seconds['bandwidth']
    limit = bandwidth / active
    what = f'float32, greedy, {tokens} tokens after {PROMPT + SHORT}; reference: '
    reading = f'one reading of {active / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s'
    yield _row('decode/batch1', rate(FLOAT32, 1), limit, what + reading)
    conditions = f'int8, {what}float32'
    yield _row('decode/batch1/int8', rate(INT8, 1), rate(FLOAT32, 1), conditions)
    if not theirs:
        return
    own = rate(best[1], 1)
    yield _row('decode/batch1/transformers', own, limit, f'{best[1]}; {what}{reading}')
    yield _row(
        f'decode/batch{batch}',
        rate(FLOAT32, batch),
        rate(best[batch], batch),
        f'{what}{best[batch]}',
    )


def _fastest(ways: dict[str, Callable[[int, int], Any]], rows: int) -> str:
    """Tries each way on a short text, once, and names the fastest."""
    texts = {name: functools.partial(writer, rows, SHORT) for name, writer in ways.items()}
    seconds = interleaved_medians(texts, repeats=1)
    return min(seconds, key=lambda name: seconds[name])


def _row(name: str, value: float, reference: float, conditions: str) -> Row:
    return ratio_row(name, 'token/s', value, reference, f'{conditions}; {this_machine()}')


def _read_parameters(config: TransformerConfig) -> int:
    """Parameters that a token reads: the active ones, of the embedding one row."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    return parameter_report(config).active - embedding + config.embed_dim


def our_writers(config: TransformerConfig) -> dict[str, Callable[[int, int], Any]]:
    """Returns `moe.decode.write` of a model with random weights: (rows, new tokens) -> tokens.

    Its matrices are float32, or the nearest integers of 8 bits.
    """
    model = Transformer(config)
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.ones((1, 1), jnp.int32))))
    variables, key = init(jax.random.key(0)), jax.random.key(1)

    def run(variables: Any, rows: int, length: int) -> Any:
        prompts = _prompts(rows, config.vocab_size)
        settings = {'max_new_tokens': length, 'sampling': Sampling(0.0), 'key': key}
        return write(model, variables, prompts, **settings).tokens

    forms = {FLOAT32: variables, INT8: quantise(model, variables)}
    return {name: functools.partial(run, form) for name, form in forms.items()}


def their_writers(config: TransformerConfig) -> dict[str, Callable[[int, int], Any]]:
    """Returns `generate` of transformers with each of its ways to run experts; {} without it."""
    try:
        torch, transformers = map(importlib.import_module, ('torch', 'transformers'))
    except ImportError:
        print('transformers is not measured: it comes with the extra hf-test.', flush=True)
        return {}
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(_their_config(transformers, config)).eval()

    def run(way: str, rows: int, length: int) -> None:
        model.set_experts_implementation(way)
        tokens = torch.tensor(_prompts(rows, config.vocab_size))
        with torch.inference_mode():
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )

    ways = ('eager', 'batched_mm', 'grouped_mm')
    return {f'transformers {way}': functools.partial(run, way) for way in ways}


def _their_config(transformers: Any, config: TransformerConfig) -> Any:
    attention, moe = config.attention, config.moe
    assert isinstance(attention, AttentionConfig)
    assert moe is not None
    return transformers.Qwen3MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        num_experts=moe.router.num_experts,
        num_experts_per_tok=moe.router.experts_per_token,
        moe_intermediate_size=moe.expert_dim,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=None,
    )


def _prompts(rows: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (rows, PROMPT))
