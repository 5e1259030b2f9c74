"""Findings as a report reads them: leniently, since older and newer versions wrote other fields.

A field that is not there is a dash on the page, and never an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_plm.report.charts import Series
from hf_plm.report.page import MISSING, Html, bounds, facts, first, join, missing, table

KINDS = ("evaluation", "score", "scan", "dms", "contacts", "probe", "comparison")


@dataclass(frozen=True)
class Finding:
    """A file of findings, read."""

    path: Path
    plain: dict[str, Any]

    @property
    def kind(self) -> str:
        return said(self.plain, "kind")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A list of dicts; empty where the field is not one."""
        return rows_of(self.plain, name)


def rows_of(plain: Any, name: str) -> list[dict[str, Any]]:
    found = plain.get(name) if isinstance(plain, dict) else None
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def dict_of(plain: Any, name: str) -> dict[str, Any]:
    found = plain.get(name) if isinstance(plain, dict) else None
    return found if isinstance(found, dict) else {}


def list_of(plain: Any, name: str) -> list[Any]:
    found = plain.get(name) if isinstance(plain, dict) else None
    return found if isinstance(found, list) else []


def said(plain: dict[str, Any], name: str, otherwise: str = MISSING) -> str:
    """A field as text."""
    found = plain.get(name)
    return otherwise if found is None else str(found)


def short(name: object) -> str:
    """A model's name for a table: the last part of a path, a repository as it is."""
    if name is None:
        return MISSING
    text = str(name).rstrip("/\\")
    path = Path(text)
    if path.name == "hub" and path.parent.name:
        return path.parent.name
    is_path = path.is_absolute() or len(path.parts) > 2 or text.startswith(".") or path.exists()
    return path.name or text if is_path else text


def model_of(finding: Finding) -> str:
    """The names of its models, for a sentence or a legend."""
    return ", ".join(short(one.get("model")) for one in finding.rows("models")) or "unknown"


def source_name(name: object) -> str:
    """A file, or the split of a prepared corpus that its shards are of."""
    split = re.fullmatch(r"(\w+)-\d+-of-\d+\.parquet", str(name))
    return f"the {split[1]} split" if split else str(name)


def intervals(label: str, values: Sequence[Any], style: int, x: Sequence[float] = ()) -> Series:
    """A series of `[value, low, high]`."""
    ends = [bounds(value) for value in values]
    return Series(
        label,
        x or range(len(values)),
        [first(value) for value in values],
        [low for low, _ in ends],
        [high for _, high in ends],
        style,
        "marked",
    )


def listing(findings: Sequence[Finding], unread: Sequence[str]) -> Html:
    """Every file of findings, and what could not be read."""
    rows = [
        (
            finding.path.name,
            finding.kind + ("" if finding.kind in KINDS else " (not known to this version, so not shown)"),
            ", ".join(short(one.get("model")) for one in finding.rows("models")),
            said(finding.plain, "made")[:10],
            said(finding.plain, "hf_plm"),
        )
        for finding in findings
    ]
    parts = [table("Findings", ["File", "Kind", "Models", "Made", "hf_plm"], rows)] if rows else []
    if unread:
        parts.append(facts(("left out", sentence) for sentence in unread))
    return (
        join(parts) if parts else missing("There are none yet: hf-plm evaluate, score, contacts and probe keep them.")
    )
