"""Published architectures: their parameters as published, and as the built model has them."""

import math

import jax
import pytest

from moe.accounting import parameter_report
from moe.config import TransformerConfig
from moe.errors import InputError
from moe.presets import PRESETS, preset
from moe.sharding import abstract_variables
from moe.transformer import Transformer


def counts(name: str, without: str) -> tuple[float, float]:
    """Total and active billions, without nothing, the 'table' (of active ones), or 'embeddings'."""
    config, report = preset(name), parameter_report(preset(name))
    total, active = report.total, report.active
    if without == 'table':
        active -= config.vocab_size * config.embed_dim
    if without == 'embeddings':
        total, active = total - report.embedding, active - report.embedding
    return total / 1e9, active / 1e9


@pytest.mark.parametrize(
    ('name', 'total', 'active', 'without'),
    [
        ('mixtral-8x7b', '46.7', '12.9', ''),
        ('olmoe-1b-7b', '6.9', '1.3', ''),
        ('qwen3-30b-a3b', '30.5', '3.3', ''),
        ('qwen3-235b-a22b', '235', '22', ''),
        ('deepseek-v3', '671', '37', ''),
        ('moonlight-16b-a3b', '15.29', '2.24', 'embeddings'),
        ('gpt-oss-20b', '20.91', '3.61', 'table'),
        ('gpt-oss-120b', '116.83', '5.13', 'table'),
        ('llama-3.1-8b', '8.03', '8.03', ''),
        ('qwen3-0.6b', '0.44', '0.44', 'embeddings'),
        ('qwen3-1.7b', '1.4', '1.4', 'embeddings'),
        ('qwen3-4b', '3.6', '3.6', 'embeddings'),
        ('qwen3-8b', '6.95', '6.95', 'embeddings'),
        ('qwen3-14b', '13.2', '13.2', 'embeddings'),
        ('qwen3-32b', '31.2', '31.2', 'embeddings'),
        ('gemma-2-2b', '2.024', '2.024', 'embeddings'),
        ('gemma-3-1b', '0.698', '0.698', 'embeddings'),
    ],
)
def test_counts_are_the_published_ones(name, total, active, without):
    """Within one percent, or, where the published digits say less than that, within the last."""
    for counted, published in zip(counts(name, without), (total, active), strict=True):
        digit = 10.0 ** -len(published.partition('.')[2])
        # Some cut the digits that they leave out, some round.
        as_published = (math.floor(counted / digit), round(counted / digit))
        close = counted == pytest.approx(float(published), rel=0.01)
        assert close or round(float(published) / digit) in as_published, (counted, published)


def test_kimi_k2_is_a_percent_smaller_than_its_paper_says():
    """1.04 trillion there; the released shapes have 1.026. Active are 32.6 billion."""
    total, active = counts('kimi-k2', '')
    assert total == pytest.approx(1040, rel=0.015)
    assert active == pytest.approx(32.6, rel=0.01)


@pytest.mark.parametrize('name', sorted(PRESETS))
def test_counts_are_those_of_the_model(name):
    params = abstract_variables(Transformer(preset(name)))['params']
    assert parameter_report(preset(name)).total == sum(x.size for x in jax.tree.leaves(params))


def test_layers_alternate_as_published():
    def windows(config: TransformerConfig) -> list[int | None]:
        return [kind.window for kind in config.attention_layers]

    assert windows(preset('gpt-oss-20b'))[:3] == [128, None, 128]
    assert windows(preset('gemma-3-1b'))[:7] == [512] * 5 + [None, 512]
    assert sum(window is None for window in windows(preset('gemma-3-1b'))) == 4
    assert preset('gemma-3-1b').attention_layers[5].rope_theta == 1e6
    assert sum(preset('deepseek-v3').moe_layers) == 58


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"received 'kimi_k2'\. Did you mean 'kimi-k2'\?"):
        preset('kimi_k2')
