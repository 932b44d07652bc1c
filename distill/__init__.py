"""Distillation in JAX: targets, divergences, objectives and the fused loss."""

from distill.across import CrossTokenizer
from distill.answer_ledger import AnswerLedger
from distill.asking import Manner, ask_all
from distill.backoff import Backoff
from distill.budget import Limits
from distill.cache import CachedTargets, TargetsWriter
from distill.config import RolloutConfig
from distill.cross_tokenizer import SpanLoss, span_log_probs, span_loss
from distill.divergences import (
    adaptive_kl,
    adaptive_kl_per_token,
    alpha_divergence,
    alpha_divergence_per_token,
    cross_entropy,
    cross_entropy_per_token,
    forward_kl,
    forward_kl_per_token,
    hinge,
    hinge_per_token,
    jeffreys,
    jeffreys_per_token,
    jsd,
    jsd_per_token,
    ranking,
    ranking_per_token,
    reverse_kl,
    reverse_kl_per_token,
    skew_forward_kl,
    skew_forward_kl_per_token,
    skew_reverse_kl,
    skew_reverse_kl_per_token,
    total_variation,
    total_variation_per_token,
)
from distill.estimators import SampledEstimator, TopKEstimator, TruncatedEstimator
from distill.feature_losses import (
    attention_match_loss,
    hidden_match_loss,
    relation_match_loss,
    usage_match_loss,
)
from distill.features import Feature
from distill.foreign_teacher import ForeignTeacher
from distill.fused import fused_distillation_loss
from distill.objective import Objective, Term
from distill.panel import TeacherPanel
from distill.partwise import PartwiseTeacher
from distill.provenance import Provenance
from distill.remote import RemoteServer, Request
from distill.returns import normalized_returns
from distill.rollout import Rollout, roll_out
from distill.router_match import router_match_loss
from distill.schedules import Schedule
from distill.spans import SpanAlignment, match_vocabularies, shared_spans
from distill.teacher import CachedTeacher, EstimatedTeacher, OnlineTeacher
from distill.types import (
    Batch,
    DenseTargets,
    HiddenTargets,
    SampledTargets,
    TopKTargets,
    TrainState,
)

__all__ = [
    'AnswerLedger',
    'Backoff',
    'Batch',
    'CachedTargets',
    'CachedTeacher',
    'CrossTokenizer',
    'DenseTargets',
    'EstimatedTeacher',
    'Feature',
    'ForeignTeacher',
    'HiddenTargets',
    'Limits',
    'Manner',
    'Objective',
    'OnlineTeacher',
    'PartwiseTeacher',
    'Provenance',
    'RemoteServer',
    'Request',
    'Rollout',
    'RolloutConfig',
    'SampledEstimator',
    'SampledTargets',
    'Schedule',
    'SpanAlignment',
    'SpanLoss',
    'TargetsWriter',
    'TeacherPanel',
    'Term',
    'TopKEstimator',
    'TopKTargets',
    'TrainState',
    'TruncatedEstimator',
    'adaptive_kl',
    'adaptive_kl_per_token',
    'alpha_divergence',
    'alpha_divergence_per_token',
    'ask_all',
    'attention_match_loss',
    'cross_entropy',
    'cross_entropy_per_token',
    'forward_kl',
    'forward_kl_per_token',
    'fused_distillation_loss',
    'hidden_match_loss',
    'hinge',
    'hinge_per_token',
    'jeffreys',
    'jeffreys_per_token',
    'jsd',
    'jsd_per_token',
    'match_vocabularies',
    'normalized_returns',
    'ranking',
    'ranking_per_token',
    'relation_match_loss',
    'reverse_kl',
    'reverse_kl_per_token',
    'roll_out',
    'router_match_loss',
    'shared_spans',
    'skew_forward_kl',
    'skew_forward_kl_per_token',
    'skew_reverse_kl',
    'skew_reverse_kl_per_token',
    'span_log_probs',
    'span_loss',
    'total_variation',
    'total_variation_per_token',
    'usage_match_loss',
]
