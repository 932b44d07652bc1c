"""What tokens and training cost: a price table as data, and arithmetic that is shown.

The prices are vendors' public on-demand list prices, as known on the date that each row states and
not checked since. Discounts, commitments, other regions and other vendors differ widely: a row of
one's own (`dataclasses.replace`, or a new `ChipPrice`) is meant to take its place.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import flax.linen as nn
import jax
from jaxtyping import Array, Int

from distill.timing import interleaved_medians
from moe.accounting import flops_per_token
from moe.config import TransformerConfig, require
from moe.errors import InputError

SECONDS_PER_HOUR = 3600
BACKWARD_TO_FORWARD = 2


@dataclasses.dataclass(frozen=True)
class ChipPrice:
    """What an hour of one chip costs, and what the chip can do at best.

    Attributes:
        chip: the name it is asked for by.
        usd_per_hour: of one chip, with its share of the host.
        device_kind: a regular expression of what jax calls the chip (`Device.device_kind`).
        date: as of which the price was known, YYYY-MM.
        source: whose price, for what, where, in words.
        peak_flops: dense bfloat16 FLOP/s of the vendor's data sheet; None where none is published.
        memory_bandwidth: bytes/s of the chip's memory, likewise.
    """

    chip: str
    usd_per_hour: float
    device_kind: str
    date: str
    source: str
    peak_flops: float | None = None
    memory_bandwidth: float | None = None

    def __post_init__(self) -> None:
        where = f'price of {self.chip!r}: '
        require(bool(self.chip), 'price: chip', 'a name', self.chip)
        require(self.usd_per_hour > 0, where + 'usd_per_hour', 'positive', self.usd_per_hour)
        for name in ('date', 'source'):
            stated = getattr(self, name)
            require(bool(stated), where + name, 'stated, so that a figure can be judged', stated)
        for name in ('peak_flops', 'memory_bandwidth'):
            peak = getattr(self, name)
            require(peak is None or peak > 0, where + name, 'positive, or None', peak)

    def is_of(self, device_kind: str) -> bool:
        """Whether the price is that of a device that jax calls `device_kind`."""
        return re.fullmatch(self.device_kind, device_kind) is not None


PRICES = (
    ChipPrice(
        chip='cpu-2vcpu',
        usd_per_hour=0.08925,
        device_kind='cpu',
        date='2025-06',
        source='Amazon EC2 on-demand list price, c7i.large (2 vCPU, 4 GiB), Linux, N. Virginia',
    ),
    ChipPrice(
        chip='tpu-v5e',
        usd_per_hour=1.20,
        device_kind='TPU v5( lite|e)',
        date='2025-06',
        source='Google Cloud TPU on-demand list price a chip-hour, lowest of the US regions',
        peak_flops=197e12,
        memory_bandwidth=819e9,
    ),
    ChipPrice(
        chip='tpu-v5p',
        usd_per_hour=4.20,
        device_kind='TPU v5p?',
        date='2025-06',
        source='Google Cloud TPU on-demand list price a chip-hour, lowest of the US regions',
        peak_flops=459e12,
        memory_bandwidth=2765e9,
    ),
    ChipPrice(
        chip='tpu-v6e',
        usd_per_hour=2.70,
        device_kind='TPU v6( lite|e)',
        date='2025-06',
        source='Google Cloud TPU on-demand list price a chip-hour, lowest of the US regions',
        peak_flops=918e12,
        memory_bandwidth=1640e9,
    ),
    ChipPrice(
        chip='h100',
        usd_per_hour=6.88,
        device_kind='NVIDIA H100.*',
        date='2025-06',
        source='Amazon EC2 on-demand list price, p5.48xlarge ($55.04) over its 8 GPUs, N. Virginia',
        peak_flops=989e12,
        memory_bandwidth=3350e9,
    ),
    ChipPrice(
        chip='h200',
        usd_per_hour=7.91,
        device_kind='NVIDIA H200.*',
        date='2025-06',
        source='Amazon EC2 on-demand list price, p5en.48xlarge ($63.30) over its 8 GPUs, Ohio',
        peak_flops=989e12,
        memory_bandwidth=4800e9,
    ),
)


class TokenPrice(TypedDict):
    """Dollars per million tokens with everything needed to recompute or doubt them."""

    value: float
    chip: str
    price_source: str
    basis: str


def chip_price(chip: str, prices: Iterable[ChipPrice] = PRICES) -> ChipPrice:
    """Looks a chip up by name.

    Args:
        chip: its name in the table.
        prices: the table; rows of one's own come first, as the first match is returned.

    Raises:
        InputError: for a chip that the table does not hold; it names those it does.
    """
    prices = tuple(prices)
    for price in prices:
        if price.chip == chip:
            return price
    known = ', '.join(price.chip for price in prices)
    raise InputError(
        f'No price is known for chip {chip!r}; choose from {known}, or give a price of your own '
        f'with its date and source.'
    )


def usd_per_million_tokens(
    tokens_per_second: float, price: ChipPrice, *, chips: int = 1
) -> TokenPrice:
    """Prices a throughput: `usd_per_hour * chips / (tokens_per_second * 3600) * 1e6`.

    Args:
        tokens_per_second: measured on `chips` chips together.
        price: of one chip.
        chips: how many were used.

    Returns:
        The value in dollars per million tokens, the chip, the source and date of its price, and the
        arithmetic in words.

    Raises:
        InputError: where the throughput or the number of chips is not positive and finite.
    """
    valid = math.isfinite(tokens_per_second) and tokens_per_second > 0
    require(valid, 'tokens_per_second', 'positive and finite', tokens_per_second)
    require(chips >= 1, 'chips', 'at least 1', chips)
    value = price.usd_per_hour * chips / (tokens_per_second * SECONDS_PER_HOUR) * 1e6
    return TokenPrice(
        value=value,
        chip=price.chip,
        price_source=f'{price.source}, as of {price.date}',
        basis=(
            f'${price.usd_per_hour:.6g}/chip-hour * {chips} / ({tokens_per_second:.6g} tokens/s * '
            f'{SECONDS_PER_HOUR} s/hour) * 1e6 = ${value:.6g} per million tokens'
        ),
    )


def training_flops(
    config: TransformerConfig,
    *,
    tokens: int,
    context_length: int,
    teacher: TransformerConfig | None = None,
) -> int:
    """Counts the FLOPs of training: a backward pass costs two forward passes; a teacher only reads.

    `tokens * (3 forward(student) + forward(teacher))`, the student's with its multi-token
    prediction. Recomputation (remat) and the optimizer's elementwise work are not counted.

    Args:
        config: the model that is trained.
        tokens: seen in training.
        context_length: of the sequences they stand in.
        teacher: run forward on every token; None for plain training.

    Raises:
        InputError: where a count is not positive.
    """
    require(tokens >= 1, 'tokens', 'at least 1', tokens)
    forward = flops_per_token(config, context_length=context_length, mtp=True).total
    total = (1 + BACKWARD_TO_FORWARD) * forward
    if teacher is not None:
        total += flops_per_token(teacher, context_length=context_length).total
    return tokens * total


def chip_hours(flops: float, price: ChipPrice, *, utilization: float) -> float:
    """Estimates hours of one chip: `flops / (peak_flops * utilization) / 3600`.

    Args:
        flops: of the model, as `training_flops` counts them.
        price: of the chip; its `peak_flops` must be known.
        utilization: the share of the peak that the model's FLOPs reach (MFU), in (0, 1].

    Raises:
        InputError: for a chip without a published peak, or a utilization outside (0, 1].
    """
    require(0 < utilization <= 1, 'utilization', 'in (0, 1]', utilization)
    if price.peak_flops is None:
        raise InputError(
            f'Chip-hours need a peak FLOP/s, and none is published for {price.chip!r}; choose '
            f'another chip or give its price row a measured peak_flops.'
        )
    return flops / (price.peak_flops * utilization) / SECONDS_PER_HOUR


def teacher_to_student(
    *,
    teacher_flops: float,
    student_flops: float,
    teacher_usd: float | None = None,
    student_usd: float | None = None,
) -> dict[str, float]:
    """Returns how many times more the teacher costs; a ratio that was not measured is absent.

    Args:
        teacher_flops: FLOPs per token.
        student_flops: likewise.
        teacher_usd: dollars per million tokens, on the same chip as the student's.
        student_usd: likewise.
    """
    ratios = {'teacher_to_student_flops': teacher_flops / student_flops}
    if teacher_usd is not None and student_usd is not None:
        ratios['teacher_to_student_usd'] = teacher_usd / student_usd
    return ratios


def measure_prefill(
    models: Mapping[str, tuple[nn.Module, Any, Int[Array, 'B T']]], *, repeats: int = 5
) -> dict[str, float]:
    """Measures the throughput of whole sequences in one forward pass.

    It ends in the logits of every position and writes no key-value cache. Every model is compiled
    and run once before the clock starts; then they run in turn, so that a machine that is busy for
    a while is busy for all of them.

    Args:
        models: by name a model, applied as `model.apply(variables, tokens)`, its variables,
            unboxed, and the batch; of one size for all, which decides the throughput as much as a
            model does.
        repeats: timed runs of each, at least 1.

    Returns:
        Tokens per second of each, by its median run.

    Raises:
        InputError: where `repeats` is below 1.
    """
    require(repeats >= 1, 'repeats', 'at least 1', repeats)
    forwards = {
        name: functools.partial(_prefill, model, variables, tokens)
        for name, (model, variables, tokens) in models.items()
    }
    seconds = interleaved_medians(forwards, repeats=repeats)
    return {name: models[name][2].size / median for name, median in seconds.items()}


@functools.partial(jax.jit, static_argnums=0)
def _prefill(model: nn.Module, variables: Any, tokens: Int[Array, 'B T']) -> Any:
    return model.apply(variables, tokens)
