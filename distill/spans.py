"""Where two tokenizations of a text agree on a boundary: spans of tokens that hold equal bytes."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import numpy as np
from jaxtyping import Array, Int

from distill.tokenizer import Tokenizer
from moe.errors import InputError

# The start and the end of a document, which both tokenizers mark and no byte stands for.
MARK_LENGTH = 1


@flax.struct.dataclass
class SpanAlignment:
    """Which span each predicted token is part of, in a student's and a teacher's rows.

    A span is the fewest tokens of both sides, one after the other, that hold the same bytes. Spans
    are numbered from 0 in each row; -1 marks a position that predicts nothing, or a token that has
    no whole counterpart in the row.

    Attributes:
        student: of the label at each position of the student's rows.
        teacher: of the label at each position of the teacher's rows, which hold the same text.
    """

    student: Int[Array, 'B T']
    teacher: Int[Array, 'B Tt']


@dataclasses.dataclass(frozen=True)
class MatchedVocabulary:
    """Ids of two vocabularies that stand for the same bytes, or for the same end of a document.

    Attributes:
        student: matched ids, `M` of them.
        teacher: `teacher[i]` stands for what `student[i]` does.
        student_rest: the other ids of the student.
        teacher_rest: the other ids of the teacher.
    """

    student: Int[np.ndarray, 'M']
    teacher: Int[np.ndarray, 'M']
    student_rest: Int[np.ndarray, 'Vs-M']
    teacher_rest: Int[np.ndarray, 'Vt-M']


def token_lengths(tokenizer: Tokenizer, table: Sequence[bytes]) -> Int[np.ndarray, 'V']:
    """Returns the bytes that each id spans; `bos` and `eos` span a mark that both sides share."""
    lengths = np.array([len(entry) for entry in table], np.int64)
    lengths[[tokenizer.bos_id, tokenizer.eos_id]] = MARK_LENGTH
    return lengths


def shared_spans(
    student_lengths: Int[np.ndarray, 'n'], teacher_lengths: Int[np.ndarray, 'm']
) -> tuple[Int[np.ndarray, 'n'], Int[np.ndarray, 'm']]:
    """Numbers the spans of two tokenizations of the same bytes.

    A span closes wherever both sides end a token at the same byte, be that within a character.
    Tokens without bytes (a special token amid the text) belong to the span that is open.

    Args:
        student_lengths: bytes of each of the student's tokens, in order.
        teacher_lengths: of each of the teacher's.

    Returns:
        The span of each token, from 0, for both sides.

    Raises:
        InputError: where the two do not hold equally many bytes.

    Source: GOLD (Hugging Face, 2025) merges tokens up to the next boundary that both share.
    """
    ends = [np.cumsum(lengths) for lengths in (student_lengths, teacher_lengths)]
    totals = [int(end[-1]) if end.size else 0 for end in ends]
    if totals[0] != totals[1]:
        raise InputError(
            'Two tokenizations can be aligned where they hold the same bytes; received '
            f'{totals[0]} of the student and {totals[1]} of the teacher. Encode the same text, '
            'without special tokens or normalisation that adds or drops characters.'
        )
    shared = np.intersect1d(ends[0], ends[1])
    shared = shared[shared > 0]
    student, teacher = (np.searchsorted(shared, end) for end in ends)
    return student, teacher


def match_vocabularies(
    student: Tokenizer,
    teacher: Tokenizer,
    student_table: Sequence[bytes],
    teacher_table: Sequence[bytes],
) -> MatchedVocabulary:
    """Pairs the ids of two tokenizers by the bytes they stand for, and `bos` and `eos` by role.

    Neither width nor id plays a part: two vocabularies of equal width may differ, and padding of a
    wider model is matched with nothing. Of several ids for the same bytes the lowest is matched.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        student_table: `token_bytes(student)`.
        teacher_table: `token_bytes(teacher)`.
    """
    of_teacher = _lowest_ids(teacher_table)
    pairs = {
        index: of_teacher[entry]
        for entry, index in _lowest_ids(student_table).items()
        if entry in of_teacher
    }
    pairs |= {student.bos_id: teacher.bos_id, student.eos_id: teacher.eos_id}
    matched = np.array(sorted(pairs.items()), np.int32)
    return MatchedVocabulary(
        student=matched[:, 0],
        teacher=matched[:, 1],
        student_rest=np.setdiff1d(np.arange(len(student_table), dtype=np.int32), matched[:, 0]),
        teacher_rest=np.setdiff1d(np.arange(len(teacher_table), dtype=np.int32), matched[:, 1]),
    )


def _lowest_ids(table: Sequence[bytes]) -> dict[bytes, int]:
    return {entry: index for index, entry in reversed(list(enumerate(table))) if entry}
