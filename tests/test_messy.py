"""Real and derived files that break readers, each through the whole of `prepare`, with what must come of it.

The files are found by HF_PLM_DATA (default `../shared/data` beside the repository) and are not part of it.
"""

import os
import re
from pathlib import Path

import pytest

from hf_plm.config import UserError
from hf_plm.data.prepare import prepare
from hf_plm.proteins.fasta import read_fasta

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("HF_PLM_DATA", REPOSITORY / "../shared/data"))
MESSY = (DATA if DATA.is_absolute() else REPOSITORY / DATA) / "messy"
pytestmark = pytest.mark.skipif(not MESSY.is_dir(), reason=f"no messy files at {MESSY} (HF_PLM_DATA)")

# file: (records read, kept, duplicates, rejected), or what the one sentence must hold
KEPT = {
    "real/bio_embeddings__illegal_amino_acids.fasta": (3, 3, 0, 0),
    "real/bio_embeddings__fasta.fa": (5, 5, 0, 0),
    "real/metamorpheus__indexEngineTestFasta.fasta": (1, 1, 0, 0),
    "real/metamorpheus__P13987_contaminant.fasta": (1, 1, 0, 0),
    "real/crux-toolkit__ambiguous.fasta": (4, 4, 0, 0),
    "real/crux-toolkit__comet_noenzyme.fasta": (66, 66, 0, 0),
    "real/sequenceserver__Protein_TP53_COX41.fasta": (2, 2, 0, 0),
    "real/sequenceserver__Nucleotide_TP53_COX41.fasta": (2, 2, 0, 0),
    "real/sequenceserver__pipe_in_seqid.fa": (1, 1, 0, 0),
    "real/sequenceserver__duplicate_ids.fasta": (2, 1, 1, 0),
    "real/sequenceserver__problematic_query.fa": (1, 1, 0, 0),
    "real/phanns__test.fasta": (3, 3, 0, 0),
    "real/antismash__C_domains.fasta": (13, 13, 0, 0),
    "real/plm-blast__seq.fasta": (101, 98, 1, 2),
    "real/diamond__1.faa": (1, 1, 0, 0),
    "real/diamond__nr_300.faa": (300, 300, 0, 0),
    "real/biopython__DMB_prot.pir": (6, 6, 0, 0),
    "real/biopython__seqs.fasta": (2, 2, 0, 0),
    "real/biopython__aster.pro": (1, 1, 0, 0),
    "real/biopython__aster_pearson.pro": (1, 1, 0, 0),
    "real/pasta__bad_names.fasta": (5, 1, 4, 0),
    "real/cblaster__test_database.fasta": (53, 29, 23, 1),
    "real/bakta__AMRProt-susceptible.fa": (29, 29, 0, 0),
    "real/eggnog-mapper__out.emapper.genepred.fasta": (3, 3, 0, 0),
    "real/rbo-epsilon__1ha8A.fasta": (1, 1, 0, 0),
    "real/rare_letters_UOBZJX.fasta": (154, 154, 0, 0),
    "derived/multi_member.fasta.gz": (56, 56, 0, 0),
    "derived/multi_member_split_mid_record.fasta.gz": (56, 56, 0, 0),
    "derived/cr_only.fasta": (5, 5, 0, 0),
    "derived/lowercase.fasta": (20, 20, 0, 0),
    "derived/softmasked.fasta": (20, 20, 0, 0),
    "derived/utf8_bom.fasta": (3, 3, 0, 0),
    "derived/plain_text_named.fasta.gz": (4, 4, 0, 0),
    "derived/gzip_named.fasta": (4, 4, 0, 0),
    "derived/leading_text.fasta": (2, 2, 0, 0),
    "derived/whitespace.fasta": (5, 5, 0, 0),
    "derived/latin1_header.fasta": (1, 1, 0, 0),
    "derived/same_id_different_seq.fasta": (3, 3, 0, 0),
}
TOO_MANY = (
    "{} of {} records are rejected for illegal characters or no residues, more than 10%, the first: {}, record {}"
)
REFUSED = {
    "real/bio_embeddings__unparsable.fasta": (1, 3, "2 (unparsable), position 29: 'ä'"),
    "real/crux-toolkit__comet_stop-codon.fasta": (6, 6, "1 (tmp), position 1: '*'"),
    "real/sequenceserver__funky_aa_sequences.fa": (2, 3, "1 (gap), position 34: '-'"),
    "real/biotite__invalid.fasta": (1, 1, "1 (its), position 4: '?'"),
    "real/biopython__fa01": (2, 2, "1 (AK1H_ECOLI/1-378), position 31: '-'"),
    "real/internal_stops.fasta": (60, 60, "1 (b4579), position 11: '*'"),
}
UNREADABLE = {
    "real/hmmer__20aa.sto": "is not FASTA but a Stockholm alignment: it begins with '# STOCKHOLM 1.0'.",
    "derived/truncated.fasta.gz": "is cut or damaged: its gzip stream breaks off in record 18; "
    "copy or download it again.",
    "derived/empty.fasta": "is empty; FASTA was expected (records that begin with '>').",
}


def test_every_file_has_an_expectation() -> None:
    listed = {line.split("\t")[0] for line in (MESSY / "INDEX.tsv").read_text(encoding="utf-8").splitlines()[1:]}
    assert listed == set(KEPT) | set(REFUSED) | set(UNREADABLE)


@pytest.mark.parametrize("file", sorted(KEPT))
def test_kept(file: str, tmp_path: Path) -> None:
    counts = prepare(MESSY / file, tmp_path / "corpus").counts
    assert (counts.read, counts.kept, counts.duplicates, counts.rejected) == KEPT[file]
    listed = (tmp_path / "corpus" / "rejected.tsv").read_text(encoding="utf-8").splitlines()[1:]
    of_records = [line for line in listed if line.split("\t")[1] != "0"]
    assert len(of_records) == counts.read - counts.kept, "what is not kept is listed, record by record"


@pytest.mark.parametrize("file", sorted(REFUSED))
def test_refused(file: str, tmp_path: Path) -> None:
    rejected, read, first = REFUSED[file]
    start = TOO_MANY.format(rejected, read, Path(file).name, first)
    with pytest.raises(UserError, match=re.escape(start)) as raised:
        prepare(MESSY / file, tmp_path / "corpus")
    assert "--data.illegal x" in str(raised.value)
    assert "--data.max_rejected" in str(raised.value)
    assert ("--data.gaps strip" in str(raised.value)) == ("'-'" in first)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.rejected.tsv"]
    assert str(tmp_path / "corpus.rejected.tsv") in str(raised.value)
    counts = prepare(MESSY / file, tmp_path / "as_x", illegal="x", gaps="strip").counts
    assert counts.rejected == 0
    assert counts.illegal_to_x + counts.gaps_stripped > 0


@pytest.mark.parametrize("file", sorted(UNREADABLE))
def test_unreadable(file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        prepare(MESSY / file, tmp_path / "corpus")
    assert str(raised.value) == f"{MESSY / file} {UNREADABLE[file]}"
    assert not list(tmp_path.iterdir())


def test_warnings(tmp_path: Path) -> None:
    def warnings(file: str) -> str:
        return " / ".join(prepare(MESSY / file, tmp_path / Path(file).name).warnings)

    assert "almost only A C G T" in warnings("real/sequenceserver__Nucleotide_TP53_COX41.fasta")
    assert "almost only A C G T" in warnings("real/sequenceserver__pipe_in_seqid.fa")
    assert "almost only A C G T" not in warnings("real/sequenceserver__Protein_TP53_COX41.fasta")
    assert "2 of 3 records have an id that an earlier one has" in warnings("derived/same_id_different_seq.fasta")
    assert "2 lines before the first '>' left out, the first: '# a comment'" in warnings("derived/leading_text.fasta")
    assert "3 lines of comment left out" in warnings("real/biopython__aster_pearson.pro")
    assert "PIR headers (>P1;) on 6 records" in warnings("real/biopython__DMB_prot.pir")


def test_the_same_proteins_in_other_dress_are_equal() -> None:
    def sequences(file: str) -> list[str]:
        return ["".join(record.sequence.split()).upper() for record in read_fasta(MESSY / file)]

    whole = sequences("derived/multi_member.fasta.gz")
    assert sequences("derived/multi_member_split_mid_record.fasta.gz") == whole
    assert sequences("derived/lowercase.fasta") == sequences("derived/softmasked.fasta") == whole[:20]
    assert sequences("derived/whitespace.fasta") == sequences("derived/cr_only.fasta") == whole[:5]
    assert sequences("derived/gzip_named.fasta")[:3] == whole[:3]  # its fourth is the beginning of a protein
    assert sequences("derived/gzip_named.fasta") != whole[:4], "the twin"


def test_ids_of_odd_headers() -> None:
    def ids(file: str) -> list[str]:
        return [record.id for record in read_fasta(MESSY / file)]

    assert ids("real/rbo-epsilon__1ha8A.fasta") == ["1ha8AA_ATOM"]
    assert ids("real/diamond__1.faa") == ["NP_001001178.1"]
    assert ids("real/bio_embeddings__fasta.fa")[-1].startswith("record_")
    (latin1,) = read_fasta(MESSY / "derived/latin1_header.fasta")
    assert latin1.description == "café µ-opioid"
