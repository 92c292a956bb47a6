"""Labels and scores of published pairs: whether the second text is a positive of the first."""

from __future__ import annotations

import math
from typing import Any

from grit_jax.data.records import RecordError
from grit_jax.data.text_files import Row
from grit_jax.datatools.record_writer import LeftOut
from grit_jax.errors import InputError

_BINARY = ("is_duplicate", "quality")  # 1 for the same, of QQP and MRPC
_CLASSES = ("gold_label", "entailment_judgment", "entailment_label", "label")
_SCORES = ("score", "similarity_score", "similarity", "relatedness_score")
COLUMNS = (*_BINARY, *_CLASSES, *_SCORES)

# Labels that are words: SNLI, MNLI, RTE, QNLI and SICK.
_POSITIVE_WORDS = ("entailment", "duplicate", "paraphrase", "equivalent")
_OTHER_WORDS = (
    "neutral", "contradiction", "not_entailment", "not_duplicate", "not_paraphrase", "not_equivalent",
)  # fmt: skip
_NO_WORDS = ("-", "hidden")  # annotators disagree, or the test set's labels are withheld
# Labels that are numbers, of pairs of a premise and a hypothesis: the order of SNLI, MNLI, ANLI and XNLI.
_NLI = ("entailment", "neutral", "contradiction")
_NOT_LABELLED = "there is no label"


def require_positive_pair(row: Row, min_score: float | None) -> None:
    """Checks that the second text of a row is a positive, as in every row without a label.

    Word labels, and the numbers of `is_duplicate`, of `question1` and `question2`, and of `premise` and `hypothesis`,
    mean what their authors say. Another number is a score.

    Args:
      row: The record's values by column name in lower case.
      min_score: Smallest score of a positive.

    Raises:
      LeftOut: It is not a positive.
      RecordError: A label or score is expected, and the record has none.
      InputError: There are scores but no `min_score`, or labels and a `min_score`.
    """
    there = [key for key in COLUMNS if key in row and (key != "quality" or "#1 string" in row)]
    if not there:
        if min_score is not None:
            message = f"has no score, which --min-score needs; it is under {', '.join(_SCORES)}"
            raise RecordError("no score", message)
        return
    key = next((key for key in there if key in _SCORES and min_score is not None), there[0])
    reason = _reason(row, key, min_score)
    if reason:
        raise LeftOut(reason)


def _reason(row: Row, key: str, min_score: float | None) -> str | None:
    """Why the value under a key says that the second text is not a positive; None if it is one."""
    value = row[key]
    word = value.strip().lower() if isinstance(value, str) else None
    if word in (*_POSITIVE_WORDS, *_OTHER_WORDS, *_NO_WORDS):
        _refuse_min_score(key, min_score)
        return None if word in _POSITIVE_WORDS else _NOT_LABELLED if word in _NO_WORDS else f"labelled {word}"
    number = _number(key, value)
    if key in _BINARY or (key == "label" and {"question1", "question2"} <= row.keys()):
        labels = ("labelled as not the same", None)
        min_score = None if min_score is not None and 0 < min_score <= 1 else min_score  # equivalent
    elif key == "gold_label" or (key in _CLASSES and {"premise", "hypothesis"} <= row.keys()):
        labels = (None, *(f"labelled {name}" for name in _NLI[1:]))
    elif min_score is None:
        raise InputError(
            "the records have scores, and a low one says that the second text is not a positive; "
            "give --min-score, the lowest score of a positive"
        )
    else:
        return f"{key} under {min_score:g}" if number < min_score else None
    _refuse_min_score(key, min_score)
    if number == -1:
        return _NOT_LABELLED
    if number not in range(len(labels)):
        raise RecordError("no label", f'"{key}" is {value!r:.60}; it must be from 0 to {len(labels) - 1}')
    return labels[int(number)]


def _number(key: str, value: Any) -> float:
    try:
        if isinstance(value, str | int | float) and math.isfinite(number := float(value)):
            return number
    except (ValueError, OverflowError):
        pass
    raise RecordError("no score", f'"{key}" is {value!r:.60}; it must be a finite number or a known label')


def _refuse_min_score(key: str, min_score: float | None) -> None:
    if min_score is not None:
        raise InputError(f'"{key}" holds labels of known meaning, not scores; leave --min-score out')
