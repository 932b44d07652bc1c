"""Rotary positions in a config.json, nested (`rope_parameters`) and flat (`rope_theta`)."""

from collections.abc import Mapping
from typing import Any

from moe.errors import InputError
from moe.families.fields import Fields
from moe.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

Rope = tuple[float | None, RopeScaling | None]


def read_rope(
    fields: Fields,
    default_theta: float | None = None,
    *,
    layer_type: str | None = None,
    theta_key: str = 'rope_theta',
    scaled: bool = True,
) -> Rope:
    """Returns the base of the frequencies, and their scaling.

    Args:
        fields: of the config.json; where both spellings occur, the nested one counts.
        default_theta: where neither has a base; None where there must be one.
        layer_type: whose parameters are meant, where layers differ.
        theta_key: the flat spelling's base.
        scaled: whether the flat spelling's scaling is of these layers.
    """
    nested = fields.get('rope_parameters', default=None)
    if nested is not None and layer_type is not None:
        nested = nested.get(layer_type)
    parameters = nested or (fields.get('rope_scaling', default=None) if scaled else None) or {}
    theta: Any = parameters.get('rope_theta')
    if theta is None and default_theta is None:
        theta = fields.get(theta_key)
    elif theta is None:
        theta = fields.get(theta_key, default=default_theta)
    return float(theta), _read_scaling(parameters, fields)


def _read_scaling(parameters: Mapping[str, Any], fields: Fields) -> RopeScaling | None:
    kind = parameters.get('rope_type') or parameters.get('type') or 'default'
    if parameters.get('partial_rotary_factor') not in (None, 1, 1.0):
        raise _unknown(fields, 'partial_rotary_factor', parameters['partial_rotary_factor'])
    match kind:
        case 'default':
            return None
        case 'linear':
            return LinearScaling(_number(parameters, 'factor', fields))
        case 'llama3':
            return Llama3Scaling(
                _number(parameters, 'factor', fields),
                _original_length(parameters, fields),
                _number(parameters, 'low_freq_factor', fields),
                _number(parameters, 'high_freq_factor', fields),
            )
        case 'yarn':
            return _read_yarn(parameters, fields)
        case _:
            raise _unknown(fields, 'rope_type', kind)


def _read_yarn(parameters: Mapping[str, Any], fields: Fields) -> YarnScaling:
    scaling = YarnScaling(
        _number(parameters, 'factor', fields),
        _original_length(parameters, fields),
        beta_fast=float(parameters.get('beta_fast') or 32),
        beta_slow=float(parameters.get('beta_slow') or 1),
        mscale=float(parameters.get('mscale') or 0),
        mscale_all_dim=float(parameters.get('mscale_all_dim') or 0),
        truncate=parameters.get('truncate', True),
    )
    factor = parameters.get('attention_factor')
    if factor is not None and abs(factor - scaling.table_factor) > 1e-6:
        raise _unknown(fields, 'attention_factor', factor)
    return scaling


def _original_length(parameters: Mapping[str, Any], fields: Fields) -> int:
    name = 'original_max_position_embeddings'
    return parameters.get(name) or fields.get(name, 'max_position_embeddings')


def _number(parameters: Mapping[str, Any], name: str, fields: Fields) -> float:
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f'{fields.file}: the rotary scaling needs a number {name}; received {value!r}. Add the '
            'value that the model was trained with.'
        )
    return float(value)


def _unknown(fields: Fields, name: str, value: Any) -> InputError:
    return InputError(
        f"{fields.file}: the rotary scaling has {name}={value!r}; known are the types 'default', "
        "'linear', 'llama3' and 'yarn', of whole heads, with the attention factor that follows "
        'from their other parameters. Choose another model.'
    )


def rope_parameters(theta: float | None, scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns the nested spelling."""
    match scaling:
        case None:
            return {'rope_type': 'default', 'rope_theta': theta}
        case LinearScaling():
            parameters: dict[str, Any] = {'rope_type': 'linear'}
        case Llama3Scaling():
            parameters = {
                'rope_type': 'llama3',
                'low_freq_factor': scaling.low_frequency_factor,
                'high_freq_factor': scaling.high_frequency_factor,
                'original_max_position_embeddings': scaling.original_length,
            }
        case YarnScaling():
            parameters = {
                'rope_type': 'yarn',
                'beta_fast': scaling.beta_fast,
                'beta_slow': scaling.beta_slow,
                'truncate': scaling.truncate,
                'original_max_position_embeddings': scaling.original_length,
            }
            mscales = {'mscale': scaling.mscale, 'mscale_all_dim': scaling.mscale_all_dim}
            parameters |= {name: value for name, value in mscales.items() if value}
    return parameters | {'rope_theta': theta, 'factor': scaling.factor}


def write_rope(theta: float | None, scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns both spellings."""
    parameters = rope_parameters(theta, scaling)
    flat = {name: value for name, value in parameters.items() if name != 'rope_theta'}
    return {
        'rope_parameters': parameters,
        'rope_theta': theta,
        'rope_scaling': None if scaling is None else flat,
    }
