"""How models are evaluated, fixed: which proteins, which part of them, which residues, shown how.

The perplexity of one and the same model is printed as anything from 7 to 10, according to what is masked, what counts
and what is averaged. Here all of it is one named protocol, written into every result: two results can be compared where
their `protocol` and the fingerprint of their proteins are equal, whichever models, vocabularies and machines they are
of. Another choice has another name.

Dimensions: N residues of a protein, K targets of all proteins, S proteins.
"""

import csv
import gzip
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappushpop
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import Mask, UserError
from hf_plm.data.intake import DNA_LETTERS, note_of_dna
from hf_plm.data.loader import keys_of
from hf_plm.data.mask import mask_tokens, validation_bits
from hf_plm.data.order import VALIDATION_CROP, mix, uniform_below
from hf_plm.data.sources import find_sources, read_records
from hf_plm.inference.worklist import Cleaning
from hf_plm.models.masked_lm import Query
from hf_plm.proteins.fasta import IllegalResidueError, clean
from hf_plm.proteins.vocabulary import IGNORED_LABEL, MASK_ID, STANDARD_IDS, TOKENS, encode

CROP = 1022
"""Residues: what ESM-2 takes at once."""
SEQUENCES = 2000
SEED = 0
MOST_LISTED = 1000
"""Rejected records that are named."""
_LETTER_OF_ID = np.frombuffer("".join(token if len(token) == 1 else "?" for token in TOKENS).encode(), dtype=np.uint8)


@dataclass(frozen=True)
class Protocol:
    """hf_plm-1: BERT's corruption at ESM-2's rates, drawn for each protein by its residues alone.

    Targets are standard residues, 15% of them: 80% shown as <mask>, 10% as a random standard residue, 10% as they are.
    A protein longer than the crop gives one window of it, every start equally likely, between the special tokens that
    the model's authors prescribe. A probability is over the model's whole vocabulary.
    """

    crop: int = CROP

    @property
    def name(self) -> str:
        return "hf_plm-1" if self.crop == CROP else f"hf_plm-1, crop {self.crop}"

    def as_json(self) -> dict[str, Any]:
        mask = Mask()
        return {
            "name": self.name,
            "crop_residues": self.crop,
            "target_rate": mask.rate,
            "shown_as_mask": mask.mask,
            "shown_as_random": mask.random,
            "seed": SEED,
            "targets": "the 20 standard residues",
            "probability": "over the model's whole vocabulary",
            "intervals": "95%, bootstrap over proteins, 1,000 resamples",
        }


@dataclass(frozen=True)
class Protein:
    """A protein of the sample: its window, and what is asked of it."""

    id: str
    residues: bytes  # of the whole protein
    window: tuple[int, int]
    depth: int | None  # members of its cluster
    shown: bytes  # of the window: as the model sees it where nothing is masked
    masked: np.ndarray  # places in the window
    targets: np.ndarray  # the same, ascending
    inputs: np.ndarray  # token ids of ESM-2's vocabulary, as `Evaluation` wants them
    labels: np.ndarray

    @property
    def query(self) -> Query:
        return Query(self.shown, self.masked, self.targets)


@dataclass(frozen=True)
class Sample:
    """The proteins of an evaluation and how they came about."""

    proteins: list[Protein]
    facts: dict[str, Any]


def read_sample(
    data: Sequence[str | Path],
    protocol: Protocol,
    num_sequences: int = SEQUENCES,
    split: str = "validation",
    cleaning: Cleaning | None = None,
    clusters: Path | None = None,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> Sample:
    """The proteins of the smallest keys, at most `num_sequences` (0: all): the same ones in any order of the file.

    `clusters` is a table whose first two columns are cluster and member, as MMseqs2 writes it; then each protein has
    the depth of its cluster. Raises `UserError` for what cannot be read and where too much is rejected.
    """
    cleaning = cleaning or Cleaning()
    sources = [source for source in find_sources([str(one) for one in data], split) if source.split == split]
    if not sources:
        raise UserError(f"{', '.join(map(str, data))} has no split {split!r}; --split names another.")
    counts = {"read": 0, "rejected": 0, "repeated": 0, "j_to_x": 0, "illegal_to_x": 0, "gaps_stripped": 0}
    notes = [f"{source.name}: {source.note}" for source in sources if source.note]
    rejected: list[list[str]] = []
    chosen: list[tuple[int, str, bytes, str | None]] = []  # a heap whose first has the largest key
    seen: set[int] = set()  # of those chosen
    num_members: Counter[str] = Counter()
    total = hashlib.sha256()
    for source in sources:
        own_notes: list[str] = []
        for number, raw in enumerate(read_records(source, cleaning.sequence_column, own_notes, on_bytes), start=1):
            counts["read"] += 1
            try:
                cleaned = clean(raw.sequence, cleaning.illegal, cleaning.gaps)
                reason = "" if cleaned.residues else "no residues"
            except IllegalResidueError as error:
                reason = f"illegal character {error.character!r} at position {error.position}"
            if reason:
                counts["rejected"] += 1
                if len(rejected) < MOST_LISTED:
                    rejected.append([source.name, str(number), raw.id, reason])
                continue
            counts["j_to_x"] += cleaned.num_j
            counts["illegal_to_x"] += cleaned.num_illegal
            counts["gaps_stripped"] += cleaned.num_gaps
            if raw.cluster:
                num_members[raw.cluster] += 1
            residues = cleaned.residues
            key = int(keys_of(np.frombuffer(residues, dtype=np.uint8), np.array([0, len(residues)]))[0])
            if key in seen:
                counts["repeated"] += 1
                continue
            entry = (-key, raw.id, residues, raw.cluster)
            if not num_sequences or len(chosen) < num_sequences:
                seen.add(key)
                chosen.append(entry)
                if len(chosen) == num_sequences:
                    heapify(chosen)
            elif entry[0] > chosen[0][0]:
                seen.add(key)
                seen.remove(-heappushpop(chosen, entry)[0])
        notes += [f"{source.name}: {note}" for note in own_notes]
    if counts["rejected"] > cleaning.max_rejected * counts["read"]:
        raise UserError(
            f"{counts['rejected']:,} of {counts['read']:,} records are rejected, more than "
            f"{100 * cleaning.max_rejected:g}%, the first: {', '.join(rejected[0])}; --illegal x writes X for such "
            "characters, --gaps strip takes gaps out."
        )
    chosen.sort(reverse=True)
    names = {entry[1] for entry in chosen}
    depths = _depths(clusters, names) if clusters else {}
    proteins = []
    for key, name, residues, cluster in chosen:
        total.update(residues + b"\n")
        depth = depths.get(name, num_members[cluster] if cluster else None)
        proteins.append(_protein(name, residues, depth, np.uint64(-key), protocol))
    if not any(len(protein.targets) for protein in proteins):
        raise UserError(f"{', '.join(map(str, data))} has not one standard residue to ask about.")
    together = b"".join(protein.residues for protein in proteins)
    if note := note_of_dna(len(together), len(together) - len(together.translate(None, DNA_LETTERS))):
        notes.append(note)
    facts = {
        "sources": [source.name for source in sources],
        **counts,
        "proteins": len(proteins),
        "residues": sum(len(protein.residues) for protein in proteins),
        "targets": sum(len(protein.targets) for protein in proteins),
        "cropped": sum(len(protein.residues) > protocol.crop for protein in proteins),
        "fingerprint": total.hexdigest()[:32],
        "rejected_records": rejected,
        "notes": notes,
    }
    return Sample(proteins, facts)


def _protein(name: str, residues: bytes, depth: int | None, key: np.uint64, protocol: Protocol) -> Protein:
    begin = 0
    if len(residues) > protocol.crop:
        bits = mix(SEED, VALIDATION_CROP, np.array([key]))
        begin = int(uniform_below(bits, len(residues) - protocol.crop + 1)[0])
    end = min(begin + protocol.crop, len(residues))
    ids_N = encode(residues[begin:end])
    # A place is counted as during a run, where <cls> is the first: so both corrupt a whole protein alike.
    places_N = np.arange(begin, end) + 1
    inputs_N, labels_N = mask_tokens(ids_N, validation_bits(SEED, np.full(len(ids_N), key), places_N), Mask())
    is_target_N = (labels_N != IGNORED_LABEL) & np.isin(ids_N, STANDARD_IDS)
    targets = np.flatnonzero(is_target_N)
    shown_N = np.where(is_target_N & (inputs_N != MASK_ID), inputs_N, ids_N)
    return Protein(
        name,
        residues,
        (begin, end),
        depth,
        _LETTER_OF_ID[shown_N].tobytes(),
        np.flatnonzero(is_target_N & (inputs_N == MASK_ID)),
        targets,
        inputs_N[targets],
        labels_N[targets],
    )


def _depths(path: Path, names: set[str]) -> dict[str, int]:
    """Members of the cluster that each of the names is in, from a table of cluster and member."""
    cluster_of: dict[str, str] = {}
    sizes: Counter[str] = Counter()
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file, delimiter="\t"), start=1):
                if len(row) < 2:
                    raise UserError(f"{path}, line {number}: a cluster and a member with a tab between were expected.")
                if number == 1 and row[1] == "member":
                    continue
                sizes[row[0]] += 1
                if row[1] in names:
                    cluster_of[row[1]] = row[0]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table of clusters: {error}.") from None
    if not cluster_of:
        raise UserError(f"{path} names none of the proteins: its columns should be a cluster and the id of a member.")
    return {name: sizes[cluster] for name, cluster in cluster_of.items()}
