"""The flags of the commands that have a model write texts."""

from absl import flags

ROWS = flags.DEFINE_integer('rows', 8, 'Texts written at once.', lower_bound=1)
MAX_LENGTH = flags.DEFINE_integer('max_length', 4096, 'Tokens of prompt and text.', lower_bound=2)
