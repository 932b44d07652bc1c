"""The flags of the commands whose work is to write, and the engine that they ask for."""

from absl import flags

from experiments import cli
from experiments.loaded import Loaded
from experiments.model_flags import CHECKPOINT, loaded_model
from experiments.writing_flags import MAX_LENGTH, ROWS
from moe.engine import Engine
from moe.requests import EngineConfig

MAX_PAGES = flags.DEFINE_integer(
    'max_pages',
    None,
    'Of 64 tokens, in the cache of each part that a mesh splits the texts into; others wait.',
)


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
