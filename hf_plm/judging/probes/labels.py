"""What labels mean: two classes, several, or a quantity, told from how they are written.

A column that nearly but not quite fits is refused by its first odd cell, since a guess would be silent: 39 numbers and
one `<5` are not 40 classes.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from hf_plm.config import UserError

KINDS = ("binary", "multiclass", "regression")
MISSING = ("", "-", "?", "na", "n/a", "n.a.", "#n/a", "#na", "<na>", "nan", "-nan", "none", "null")
"""Compared in lower case: what spreadsheets, R and pandas write."""
MOST_NUMBERED_CLASSES = 10
"""Whole numbers of up to so many values are classes, of more a quantity."""
NEARLY_ALL = 0.9
"""Of so many labels that are numbers, the others are taken for mistakes."""
LARGEST = 1e30
"""Boosted trees hold labels in fp32, and squares of what they hold."""
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)

Labels = list[tuple[int, str]]
"""The line and the text of each."""


def understand(path: Path, labels: Labels, kind: str | None) -> tuple[str, tuple[str, ...], np.ndarray, np.ndarray]:
    """Kind, classes, labels of the rows that have one, and which those are.

    Raises `UserError`: no labels, labels that are nearly all numbers, that fit no `kind`, or that are the same or
    another in nearly all rows.
    """
    kept_R = np.array([not is_missing(text) for _, text in labels], dtype=bool)
    present = [label for label, is_kept in zip(labels, kept_R, strict=True) if is_kept]
    if not present:
        raise UserError(f"{path} has no label in any row.")
    texts = [text for _, text in present]
    numbers = {text: value for text in set(texts) if (value := number(text)) is not None}
    if kind in (None, "regression"):
        _check_numbers(path, present, numbers, kind)
    whole = len(numbers) == len(set(texts)) and all(value.is_integer() for value in numbers.values())
    if whole:  # 1.0 and 1 are one class
        texts = [str(int(numbers[text])) for text in texts]
        numbers = {text: float(text) for text in set(texts)}
    found = kind or _kind(set(texts), len(numbers), whole)
    if found == "regression":
        _check_size(path, present)
        return found, (), np.array([numbers[text] for text in texts], dtype=np.float64), kept_R
    classes = sorted(set(texts), key=(lambda text: (numbers[text], text)) if whole else None)
    _check_classes(path, classes, len(texts), kind)
    index = {name: place for place, name in enumerate(classes)}
    return found, tuple(classes), np.array([index[text] for text in texts], dtype=np.int64), kept_R


def is_missing(text: str) -> bool:
    """Whether a cell stands for no value."""
    return text.lower() in MISSING


def number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _kind(distinct: set[str], num_numbers: int, whole: bool) -> str:
    few = len(distinct) <= MOST_NUMBERED_CLASSES
    if num_numbers == len(distinct) > 2 and not (whole and few):
        return "regression"
    return "binary" if len(distinct) == 2 else "multiclass"


def _check_numbers(path: Path, labels: Labels, numbers: dict[str, float], kind: str | None) -> None:
    """Raises `UserError` where numbers are wanted, or nearly all are some, and others are among them."""
    others = [label for label in labels if label[1] not in numbers]
    if not others:
        return
    with_comma = [label for label in others if _DECIMAL_COMMA.fullmatch(label[1])]
    share = 1 - (len(others) - len(with_comma)) / len(labels)
    is_quantity = kind == "regression" or (share >= NEARLY_ALL and _count(numbers, with_comma) >= 3)
    if with_comma and is_quantity:
        line, text = with_comma[0]
        raise UserError(
            f"{path}, line {line}: {text!r} has a decimal comma; write {text.replace(',', '.')!r}, in all rows, or "
            "give --kind multiclass if the labels are names."
        )
    line, text = others[0]
    if kind == "regression":
        raise UserError(f"{path}, line {line}: a number was expected for regression, not {text!r}.")
    if is_quantity:
        raise UserError(
            f"{path}, line {line}: the label {text!r} is no number, as {share:.0%} of the labels are; write a number, "
            "leave the cell empty if there is none, or give --kind multiclass if the labels are names."
        )


def _count(numbers: Iterable[str], with_comma: Labels) -> int:
    """How many numbers there are: of two and a word, such as 0, 1 and x, one does not know."""
    return len({*numbers, *(text for _, text in with_comma)})


def _check_size(path: Path, labels: Labels) -> None:
    for line, text in labels:
        if abs(float(text)) > LARGEST:
            raise UserError(f"{path}, line {line}: {text[:20]} is beyond {LARGEST:g}; give labels in another unit.")


def _check_classes(path: Path, classes: list[str], num_rows: int, kind: str | None) -> None:
    if len(classes) < 2:
        raise UserError(f"{path} has the same label {classes[0]!r} in all rows: there is nothing to tell apart.")
    if kind == "binary" and len(classes) != 2:
        raise UserError(f"{path} has {len(classes)} labels ({', '.join(classes[:5])}...), and binary means two.")
    if kind is None and len(classes) > max(num_rows / 2, MOST_NUMBERED_CLASSES):
        raise UserError(
            f"{path} has {len(classes):,} different labels in {num_rows:,} rows ({', '.join(classes[:3])[:60]}...), "
            "too many to be classes; name another column with --label, or give --kind multiclass if they are."
        )
