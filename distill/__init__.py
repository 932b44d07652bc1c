"""Distillation in JAX: targets, divergences, objectives and the fused loss."""

from distill.cross_tokenizer import SpanLoss, span_log_probs, span_loss
from distill.divergences import (
    cross_entropy,
    cross_entropy_per_token,
    forward_kl,
    forward_kl_per_token,
    jsd,
    jsd_per_token,
    reverse_kl,
    reverse_kl_per_token,
    skew_forward_kl,
    skew_forward_kl_per_token,
    skew_reverse_kl,
    skew_reverse_kl_per_token,
    total_variation,
    total_variation_per_token,
)
from distill.fused import fused_distillation_loss
from distill.objective import Objective, Term
from distill.schedules import Schedule
from distill.spans import SpanAlignment, match_vocabularies, shared_spans
from distill.teacher import OnlineTeacher
from distill.types import (
    Batch,
    DenseTargets,
    HiddenTargets,
    SampledTargets,
    TopKTargets,
    TrainState,
)

__all__ = [
    'Batch',
    'DenseTargets',
    'HiddenTargets',
    'Objective',
    'OnlineTeacher',
    'SampledTargets',
    'Schedule',
    'SpanAlignment',
    'SpanLoss',
    'Term',
    'TopKTargets',
    'TrainState',
    'cross_entropy',
    'cross_entropy_per_token',
    'forward_kl',
    'forward_kl_per_token',
    'fused_distillation_loss',
    'jsd',
    'jsd_per_token',
    'match_vocabularies',
    'reverse_kl',
    'reverse_kl_per_token',
    'shared_spans',
    'skew_forward_kl',
    'skew_forward_kl_per_token',
    'skew_reverse_kl',
    'skew_reverse_kl_per_token',
    'span_log_probs',
    'span_loss',
    'total_variation',
    'total_variation_per_token',
]
