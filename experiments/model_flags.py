"""The flags of the commands that use a model, and the model that they ask for."""

from typing import Any

from absl import flags

from experiments.loaded import Loaded
from experiments.loading import load_model_of, with_weights
from moe.quantised import FORMATS
from moe.sharding import MeshConfig

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'The model: the folder of a trained stage, a published or quantised one.'
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
