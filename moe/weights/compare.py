"""What a folder must hold of a model beside what it does hold: every difference, in words."""

import pathlib
import re
from collections.abc import Mapping

from moe.config import TransformerConfig
from moe.families import Family
from moe.weights.folder import Source
from moe.weights.pieces import Piece


def compare(
    pieces: list[Piece], sources: Mapping[str, Source], config: TransformerConfig, family: Family
) -> tuple[list[str], list[Piece]]:
    """Returns what is wrong with the tensors there are, and the pieces that can be read."""
    problems, sound = [], []
    for piece in pieces:
        source = sources.get(piece.name)
        if source is None:
            problems.append(f'{piece.name}: is missing; shape {piece.shape}')
        elif source.problem is not None:
            problems.append(f'{piece.name}: {source.problem}')
        elif source.shape != piece.shape:
            problems.append(f'{piece.name}: must have shape {piece.shape}; has {source.shape}')
        else:
            sound.append(piece)
    known = {piece.name for piece in pieces}
    extra = [name for name in sources if name not in known and not _left_out(name, config, family)]
    return problems + [f'{name}: is not of this model' for name in extra], sound


def _left_out(name: str, config: TransformerConfig, family: Family) -> bool:
    """Whether a folder may hold a tensor that the model does without."""
    if config.tie_embeddings and name == 'lm_head.weight':
        return True
    layer = re.match(r'model\.layers\.(\d+)\.', name)
    if layer is not None and family.layers_behind:
        return int(layer[1]) >= config.num_layers
    return any(re.fullmatch(pattern, name) for pattern in family.left_out)


def told(folder: pathlib.Path, family: Family, problems: list[str]) -> str:
    """Says which tensors are not as they must be, all of them."""
    return '\n'.join(
        [
            f'{folder} does not hold the {family.model_type} model of its config.json; '
            f'{len(problems)} tensors are not as they must be:',
            *(f'  {problem}' for problem in problems),
            'Fetch the folder again, or correct the config.',
        ]
    )
