"""A table as people have it: CSV (with commas or semicolons) or TSV, gzip or not, with a line of column names.

Cells of tables separated by tabs may have any length; the csv module would stop at 131,072 characters, which the labels
of one long protein can exceed.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from hf_plm.config import UserError


def read_table(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The names of the columns, and line number and cells of each row."""
    if not path.exists():
        raise UserError(f"There is no file {path}; --task is a table (CSV or TSV) of proteins and labels.")
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a table (CSV or TSV) was expected.")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; a table (CSV or TSV) was expected.") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    first = text.split("\n", 1)[0].rstrip("\r")
    if not first.strip():
        raise UserError(f"{path} should begin with a line of column names, and its first line is empty.")
    if first.startswith(">"):
        raise UserError(f"{path} is FASTA; --task is a table with a column of labels.")
    separator = "\t" if "\t" in first else ";" if ";" in first and "," not in first else ","
    cells = first.split("\t") if separator == "\t" else next(csv.reader([first], delimiter=separator))
    head = [name.strip() for name in cells]
    if len(set(head)) < len(head):
        twice = next(name for name in head if head.count(name) > 1)
        raise UserError(f"{path} has two columns named {twice!r}.")
    return head, _rows(path, text, separator, len(head))


def _rows(path: Path, text: str, separator: str, width: int) -> Iterator[tuple[int, list[str]]]:
    lines = io.StringIO(text, newline=None)
    if separator == "\t":  # not csv's, which stops at cells of 131,072 characters
        numbered = ((number, line.rstrip("\n").split("\t")) for number, line in enumerate(lines, 1))
    else:
        reader = csv.reader(lines, delimiter=separator)
        numbered = ((reader.line_num, cells) for cells in reader)
    next(numbered)
    try:
        for number, cells in numbered:
            if cells in ([], [""]):
                continue
            if len(cells) != width:
                raise UserError(
                    f"{path}, line {number}: {width} cells were expected, as in the head, not {len(cells)}."
                )
            yield number, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise UserError(f"{path}: {error}; a table separated by tabs has no such limit.") from None
