"""The flags of the commands that write with a model, and the engine that they ask for."""

from typing import Any

from absl import flags

from experiments import cli
from experiments.loaded import Loaded
from experiments.loading import load_model_of, with_weights
from moe.engine import Engine
from moe.quantised import FORMATS
from moe.requests import EngineConfig
from moe.sharding import MeshConfig

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'The model: the folder of a trained stage, a published or quantised one.'
)
ROWS = flags.DEFINE_integer('rows', 8, 'Texts written at once.', lower_bound=1)
MAX_LENGTH = flags.DEFINE_integer('max_length', 4096, 'Tokens of prompt and text.', lower_bound=2)
MAX_PAGES = flags.DEFINE_integer(
    'max_pages',
    None,
    'Of 64 tokens, in the cache of each part that a mesh splits the texts into; others wait.',
)
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16', 'float16'], 'To compute in.')
DATA = flags.DEFINE_integer('data', 1, 'Devices that the texts are split over.', lower_bound=1)
WEIGHTS = flags.DEFINE_enum('weights', None, list(FORMATS), 'To quantise to, see moe.quantised.')
FSDP = flags.DEFINE_integer('fsdp', 1, 'Devices that texts and weights are split over.', 1)
EXPERT = flags.DEFINE_integer('expert', 1, 'Devices that texts and experts are split over.', 1)
TENSOR = flags.DEFINE_integer('tensor', 1, 'Devices that the weights are split over.', 1)


def loaded_model(checkpoint: str) -> Loaded:
    """Loads a model as the flags say."""
    mesh = MeshConfig(DATA.value, FSDP.value, EXPERT.value, TENSOR.value)
    alone = mesh == MeshConfig()
    loaded = load_model_of(checkpoint, mesh=None if alone else mesh, dtype=DTYPE.value)
    weights: Any = WEIGHTS.value
    return loaded if weights is None else with_weights(loaded, weights)


def loaded_engine(*, max_waiting: int) -> tuple[Loaded, Engine]:
    """Loads the model that the flags name, and makes an engine of it.

    Args:
        max_waiting: requests that may wait for a row.
    """
    loaded = loaded_model(cli.required(CHECKPOINT))
    limits = {'max_waiting': max_waiting, 'max_pages': MAX_PAGES.value}
    config = EngineConfig(ROWS.value, MAX_LENGTH.value, **limits)
    vocab_size = loaded.tokenizer.vocab_size
    return loaded, Engine(loaded.model, loaded.variables, config, vocab_size=vocab_size)
