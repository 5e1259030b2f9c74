"""What a prepared corpus says of itself: `corpus.json`, the dataset card, and the table that `prepare` prints.

Everything in it is a function of the sources and the options, so two preparations of the same files can be compared
byte by byte; no times, no paths of the machine.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_plm.config import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "corpus.json"


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split; `file` is relative to the corpus folder."""

    file: str
    sequences: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split: counts, lengths in residues at given quantiles, and how often each letter occurs."""

    sequences: int
    residues: int
    length_quantiles: dict[str, int]
    residue_counts: dict[str, int]
    shards: tuple[Shard, ...]

    @property
    def residue_frequencies(self) -> dict[str, float]:
        return {letter: count / self.residues for letter, count in self.residue_counts.items()}


@dataclass(frozen=True)
class SourceSummary:
    """One file or data set that was read: the split it was given for, its size and checksum, and what came of it."""

    name: str
    split: str
    format: str
    bytes: int
    sha256: str
    read: int
    kept: int


@dataclass(frozen=True)
class Counts:
    """Records read, kept and dropped by reason, and characters changed, over all sources."""

    read: int = 0
    kept: int = 0
    duplicates: int = 0  # of an earlier record of the same split; counted as dropped only where they are dropped
    in_other_split: int = 0  # also in validation or test, therefore out of this split
    empty: int = 0
    illegal: dict[str, int] = field(default_factory=dict)  # records by their first illegal character
    repeated_ids: int = 0  # kept records whose id an earlier one has
    j_to_x: int = 0  # residues
    illegal_to_x: int = 0  # characters
    gaps_stripped: int = 0  # characters

    @property
    def rejected(self) -> int:
        """Records that were empty or had an illegal character; duplicates are not rejected, only dropped."""
        return self.empty + sum(self.illegal.values())


@dataclass(frozen=True)
class Manifest:
    """All that is known of a prepared corpus; `corpus.json` is its mirror."""

    name: str
    format_version: int
    hf_plm_version: str
    split_kind: str  # "random", "cluster" or "given": how validation was chosen
    options: dict[str, Any]
    counts: Counts
    splits: dict[str, Split]
    sources: tuple[SourceSummary, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def is_corpus(folder: str | Path) -> bool:
    """Whether the folder is a prepared corpus."""
    return (Path(folder) / MANIFEST_NAME).is_file()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared corpus. UserError where there is none, or one of a newer format."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared corpus: it has no {MANIFEST_NAME} (`hf-plm prepare` makes one).")
    return manifest_of(path)


def manifest_of(path: Path) -> Manifest:
    """The manifest in a file; `corpus.json`, or a run's copy of it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path.parent} is a corpus of format {version}, this hf_plm reads up to {FORMAT_VERSION}: "
                "prepare it again or update hf_plm."
            )
        splits = {
            name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in raw["splits"].items()
        }
        return Manifest(
            **{
                **raw,
                "counts": Counts(**raw["counts"]),
                "splits": splits,
                "sources": tuple(SourceSummary(**source) for source in raw["sources"]),
                "warnings": tuple(raw["warnings"]),
            }
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the corpus again.") from error


SPLIT_KINDS = {
    "random": "validation is `random`: held out by a hash, so relatives of it may be in train",
    "cluster": "validation is `cluster`: whole clusters are held out",
    "given": "validation is `given`; its exact duplicates were taken out of train",
}


def report(manifest: Manifest) -> str:
    """The table of what was kept and dropped, and why, in 80 columns."""
    counts = manifest.counts
    lines = [f"{manifest.name}: {counts.read:,} records read, {counts.kept:,} kept", ""]
    lines += [f"  {'source':<40}{'split':<12}{'read':>12}{'kept':>12}"]
    shown = manifest.sources if len(manifest.sources) <= 12 else manifest.sources[:10]
    for source in shown:
        name = source.name if len(source.name) <= 38 else "..." + source.name[-35:]
        lines.append(f"  {name:<40}{source.split:<12}{source.read:>12,}{source.kept:>12,}")
    if len(shown) < len(manifest.sources):
        rest = manifest.sources[len(shown) :]
        read, kept = sum(source.read for source in rest), sum(source.kept for source in rest)
        lines.append(f"  {f'and {len(rest):,} more':<52}{read:>12,}{kept:>12,}")
    lines += _section("dropped (each in rejected.tsv)", _dropped(manifest))
    lines += _section("changed", _changed(counts))
    lines += ["", f"  {'split':<12}{'sequences':>12}{'residues':>16}{'shortest':>12}{'median':>12}{'longest':>12}"]
    for name, split in manifest.splits.items():
        shortest, median, longest = (split.length_quantiles[key] for key in ("0", "0.5", "1"))
        lines.append(
            f"  {name:<12}{split.sequences:>12,}{split.residues:>16,}{shortest:>12,}{median:>12,}{longest:>12,}"
        )
    if "validation" in manifest.splits:
        lines += ["", f"  {SPLIT_KINDS[manifest.split_kind]}"]
    return "\n".join(lines)


def _section(title: str, rows: list[tuple[int, str]]) -> list[str]:
    return ["", f"  {title}", *(f"  {count:>12,}  {text}" for count, text in rows)] if rows else []


def _dropped(manifest: Manifest) -> list[tuple[int, str]]:
    counts = manifest.counts
    rows = []
    if counts.duplicates and manifest.options["duplicates"] == "drop":
        rows.append((counts.duplicates, "same sequence as an earlier record"))
    if counts.in_other_split:
        rows.append((counts.in_other_split, "same sequence as a record of validation or test"))
    if counts.empty:
        rows.append((counts.empty, "no residues"))
    if counts.illegal:
        common = sorted(counts.illegal.items(), key=lambda item: (-item[1], item[0]))
        rows += [(count, f"illegal character {character!r}") for character, count in common[:5]]
        rows += [(sum(count for _, count in common[5:]), "other illegal characters")] if common[5:] else []
    return rows


def _changed(counts: Counts) -> list[tuple[int, str]]:
    rows = [
        (counts.j_to_x, "J to X"),
        (counts.illegal_to_x, "illegal characters to X"),
        (counts.gaps_stripped, "gaps taken out"),
    ]
    return [row for row in rows if row[0]]


# Bins of the Hub's `size_categories` tag (huggingface_hub, dataset card specification).
_SIZE_CATEGORIES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_LARGE_SIZE_CATEGORIES = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))


def dataset_card(manifest: Manifest) -> str:
    """README.md of the corpus: the front matter that the Hub reads, and the same table that was printed."""
    kept = sum(split.sequences for split in manifest.splits.values())
    bins = _SIZE_CATEGORIES + _LARGE_SIZE_CATEGORIES
    size = next((name for limit, name in bins if kept < limit), "1B<n<10B")
    files = "\n".join(f"      - split: {name}\n        path: data/{name}-*" for name in manifest.splits)
    warnings = "".join(f"- {warning}\n" for warning in manifest.warnings)
    kind = f"\nThe {SPLIT_KINDS[manifest.split_kind]}.\n" if "validation" in manifest.splits else ""
    return f"""---
pretty_name: {json.dumps(manifest.name)}
license: unknown
tags:
  - biology
  - protein
  - protein-language-model
  - hf_plm
size_categories:
  - {size}
configs:
  - config_name: default
    data_files:
{files}
---

# {manifest.name}

Protein sequences, prepared by hf_plm {manifest.hf_plm_version}. Columns: `id`, `sequence`, `length` (residues) and,
where the source has one, `cluster`. Sequences are upper case: the 20 standard amino acids and B, O, U, X, Z.
{kind}
```
{report(manifest)}
```
{chr(10) + "## Warnings" + chr(10) + chr(10) + warnings if warnings else ""}
Everything that was dropped is listed in `rejected.tsv`; `corpus.json` has checksums, options and counts.
The licence is that of the sources.
"""
