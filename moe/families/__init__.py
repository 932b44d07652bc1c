"""Families of published models, one table each: `FAMILIES` has them all.

To add one, write its table beside the others and name it here; `moe.convert` does the rest.
"""

from moe.families.deepseek import DEEPSEEK_V3
from moe.families.dense import LLAMA, QWEN2, QWEN3
from moe.families.family import Family, Limit, Tensor
from moe.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_OF_IMAGES
from moe.families.gpt_oss import GPT_OSS
from moe.families.softmax_experts import MIXTRAL, OLMOE, QWEN3_MOE

# Where several can express a model, the first is its family.
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    MIXTRAL,
    OLMOE,
    QWEN3_MOE,
    DEEPSEEK_V3,
    GPT_OSS,
)

# Folders of more than text: what they hold of it is read, and written as another family's.
READ_ALONE: tuple[Family, ...] = (GEMMA3_OF_IMAGES,)

__all__ = ['FAMILIES', 'READ_ALONE', 'Family', 'Limit', 'Tensor']
