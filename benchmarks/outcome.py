"""How a benchmark tells what it found: the machine and versions, one table, rows of `name value unit`, one JSON.

The rows come last and each on a line of its own, so that a script can read them; what was not measured reads
`name not measured`.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hf_plm.training.runtime import processor

Row = tuple[str, float | None, str]
"""Name, value (None: not measured), unit."""


def machine() -> dict[str, Any]:
    """Hardware and versions that the numbers depend on."""
    names = ("hf_plm", "torch", "transformers", "accelerate", "datasets", "numpy")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def table(heading: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, its columns aligned: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in line] for line in (heading, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    aligned = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in cells
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (aligned[0], rule, *aligned[1:]))


def finish(text: str, rows: Sequence[Row], out: Path | None, **details: Any) -> None:
    """Print the machine, `text` (the table) and the rows; write all of it, with `details`, as JSON to `out`."""
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"\n{text}\n")
    for name, value, unit in rows:
        print(f"{name} not measured" if value is None else f"{name} {value:.6g} {unit}", flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found: Mapping[str, Any] = {"machine": facts, "rows": rows, **details}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
