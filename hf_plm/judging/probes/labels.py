"""What labels mean: two classes, several, or a quantity, told from how they are written."""

import math
from pathlib import Path

import numpy as np

from hf_plm.config import UserError

KINDS = ("binary", "multiclass", "regression")
MISSING = ("", "-", "na", "nan", "none", "null", "?")
MOST_NUMBERED_CLASSES = 10
"""Whole numbers of up to so many values are classes, of more a quantity."""


def understand(
    path: Path, labels: list[tuple[int, str]], kind: str | None
) -> tuple[str, tuple[str, ...], np.ndarray, np.ndarray]:
    """Kind, classes, labels of the rows that have one, and which those are."""
    kept_R = np.array([text.lower() not in MISSING for _, text in labels], dtype=bool)
    texts = [text for (_, text), is_kept in zip(labels, kept_R, strict=True) if is_kept]
    if not texts:
        raise UserError(f"{path} has no label in any row.")
    distinct = set(texts)
    numbers = {text: number for text in distinct if (number := _number(text)) is not None}
    whole = len(numbers) == len(distinct) and all(number.is_integer() for number in numbers.values())
    if whole:  # 1.0 and 1 are one class
        texts = [str(int(numbers[text])) for text in texts]
        distinct = set(texts)
        numbers = {text: float(text) for text in distinct}
    if kind is None:
        few = len(distinct) <= MOST_NUMBERED_CLASSES
        is_quantity = len(numbers) == len(distinct) > 2 and not (whole and few)
        kind = "regression" if is_quantity else "binary" if len(distinct) == 2 else "multiclass"
    if kind == "regression":
        if len(numbers) < len(distinct):
            line, text = next((line, text) for line, text in labels if text in distinct - numbers.keys())
            raise UserError(f"{path}, line {line}: a number was expected for regression, not {text!r}.")
        return kind, (), np.array([numbers[text] for text in texts], dtype=np.float64), kept_R
    classes = sorted(distinct, key=(lambda text: (numbers[text], text)) if whole else None)
    if len(classes) < 2:
        raise UserError(f"{path} has the same label {classes[0]!r} in all rows: there is nothing to tell apart.")
    if kind == "binary" and len(classes) != 2:
        raise UserError(f"{path} has {len(classes)} labels ({', '.join(classes[:5])}...), and binary means two.")
    index = {name: number for number, name in enumerate(classes)}
    return kind, tuple(classes), np.array([index[text] for text in texts], dtype=np.int64), kept_R


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
