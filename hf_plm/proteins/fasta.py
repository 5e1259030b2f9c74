"""FASTA as people have it, read by Biopython's parser, and the one cleaning that every sequence gets on its way in.

Biopython owns the format. Ours is what comes before it: compression told by the first bytes and not by the name, any
line end, a byte-order mark, headers in no known encoding, comment lines, PIR. All of that costs half of the parser's
speed (some 110 million residues per second against 250 on one core, or 35 from gzip) and is worth it: what is wrong is
named by file and record, and what is left out is counted, never silently gone.
"""

import bz2
import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from Bio.SeqIO.FastaIO import SimpleFastaParser

from hf_plm.config import UserError
from hf_plm.proteins.vocabulary import RESIDUES


@dataclass(frozen=True, slots=True)
class Record:
    """One FASTA entry as it stands in the file: nothing is cleaned yet but the white space at line ends."""

    id: str
    description: str
    sequence: str


class IllegalResidueError(UserError):
    """A sequence with a character that is no residue, at `position` (1-based; white space, and gaps if they are
    stripped, not counted)."""

    def __init__(self, position: int, character: str):
        self.position, self.character = position, character
        super().__init__(
            f"Residues ({''.join(sorted(RESIDUES))}) were expected, not {character!r} at position {position}."
        )


class Cleaned(NamedTuple):
    """A cleaned sequence and how many of its characters were changed on the way."""

    residues: bytes
    num_j: int  # J (leucine or isoleucine), written as X
    num_illegal: int  # other illegal characters, written as X
    num_gaps: int  # gaps taken out


_WHITE_SPACE = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"  # what str.split() takes for white space, in ASCII
_GAPS = b"-."
_RESIDUES = RESIDUES.encode()
_UPPER = bytes.maketrans(b"abcdefghijklmnopqrstuvwxyzJ", b"ABCDEFGHIXKLMNOPQRSTUVWXYZX")
_TO_X = bytes(byte if byte in _RESIDUES else ord("X") for byte in range(256))


def clean(sequence: str, illegal: str = "reject", gaps: str = "reject") -> Cleaned:
    """Upper case, white space out, one trailing `*` off, `J` to `X`; about 100 million residues per second.

    illegal: "reject" raises IllegalResidueError at the first character that is none of the 25 residue letters (`-`, `.`
    and an internal `*` are none); "x" writes `X` for each. gaps: "strip" first takes `-` and `.` out.
    """
    if sequence.isascii():
        raw = sequence.encode("ascii")
    else:
        # One byte for each character, so that positions stay true; no such character is a residue.
        sequence = "".join(sequence.split())
        raw = sequence.encode("ascii", errors="replace")
    residues = raw.translate(_UPPER, _WHITE_SPACE)
    num_gaps = 0
    if gaps == "strip":
        ungapped = residues.translate(None, _GAPS)
        num_gaps = len(residues) - len(ungapped)
        residues = ungapped
    residues = residues.removesuffix(b"*")
    strangers = residues.translate(None, _RESIDUES)
    if strangers and illegal == "reject":
        position = residues.find(strangers[:1]) + 1
        raise IllegalResidueError(position, _as_written(sequence, position, gaps))
    if strangers:
        residues = residues.translate(_TO_X)
    return Cleaned(residues, raw.count(b"J") + raw.count(b"j"), len(strangers), num_gaps)


def clean_sequence(sequence: str, illegal: str = "reject", gaps: str = "reject") -> str:
    """`clean`, for who only wants the residues."""
    return clean(sequence, illegal, gaps).residues.decode("ascii")


def _as_written(sequence: str, position: int, gaps: str) -> str:
    letters = "".join(sequence.split())
    if gaps == "strip":
        letters = letters.replace("-", "").replace(".", "")
    return _readable(letters[position - 1])


def read_fasta(path: str | Path) -> Iterator[Record]:
    """The records of one FASTA file: plain, gzip (any number of members), bzip2 or Zstandard.

    Raises UserError, one sentence with the file's name: no such file, empty, not FASTA, cut or damaged.
    """
    return iter(FastaReader(path))


class FastaReader:
    """`read_fasta` with what a report needs: bytes read so far and, after the last record, what was left out."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"There is no file {path}.")
        if self.path.is_dir():
            raise UserError(f"{path} is a folder, where a FASTA file was expected.")
        if not os.access(self.path, os.R_OK):
            raise UserError(f"{path} may not be read; its permissions forbid it.")
        self.num_leading_lines = 0
        self.num_comment_lines = 0
        self.num_pir_records = 0
        self.position_bytes = 0  # of the file as it lies on disk, compressed or not
        self._first_leading = self._first_comment = ""

    def __iter__(self) -> Iterator[Record]:
        number = 0
        with open(self.path, "rb") as raw:
            stream, compression = _decompressed(raw, self.path)
            try:
                handle = self._text(stream)
                for number, (title, sequence) in enumerate(SimpleFastaParser(self._lines(handle)), start=1):
                    if number % 1000 == 0:
                        self.position_bytes = raw.tell()
                    yield _record(title, sequence, number)
            except (EOFError, zlib.error, OSError) as error:
                if not compression:
                    raise UserError(f"{self.path} could not be read after record {number} ({error}).") from error
                raise UserError(
                    f"{self.path} is cut or damaged: its {compression} stream breaks off in record {number + 1}; "
                    "copy or download it again."
                ) from error
            self.position_bytes = raw.tell()
        if number == 0:
            raise UserError(f"{self.path} is not FASTA: no line begins with '>'{self._what_it_begins_with()}.")

    @property
    def notes(self) -> list[str]:
        """One sentence for each kind of line that is in no record; complete after the last record."""
        notes = []
        if self.num_leading_lines:
            notes.append(
                f"{_lines(self.num_leading_lines)} before the first '>' left out, the first: {self._first_leading!r}"
            )
        if self.num_comment_lines:
            notes.append(f"{_lines(self.num_comment_lines)} of comment left out, the first: {self._first_comment!r}")
        if self.num_pir_records:
            notes.append(
                f"PIR headers (>P1;) on {self.num_pir_records:,} records: the line after each is read as a description"
            )
        return notes

    def _text(self, stream: Any) -> Iterator[str]:
        head = stream.peek(1)
        if not head:
            raise UserError(f"{self.path} is empty; FASTA was expected (records that begin with '>').")
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{self.path} is UTF-16 text; save it as UTF-8 or plain text.")
        if head.startswith(b"\xef\xbb\xbf"):
            stream.read(3)
            head = head[3:]
        for magic, name in _FOREIGN_MAGIC:
            if head.startswith(magic):
                raise UserError(f"{self.path} is not FASTA but {name}.")
        if b"\0" in head:
            raise UserError(f"{self.path} is not FASTA: it is binary data.")
        # Bytes that are not UTF-8 survive as surrogates, so that decoding never fails; see _decode.
        return io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=None)

    def _lines(self, handle: Iterator[str]) -> Iterator[str]:
        for line in handle:
            if line[0] == ">":
                break
            if text := line.strip():
                self._note_leading(text)
        else:
            return
        yield self._header(line, handle)
        for line in handle:
            first = line[0]
            if first == ">":
                yield self._header(line, handle)
            elif first in ";#":
                self.num_comment_lines += 1
                self._first_comment = self._first_comment or _excerpt(line)
            else:
                yield line

    def _header(self, line: str, handle: Iterator[str]) -> str:
        if line[3:4] == ";" and _PIR_HEADER.match(line):
            self.num_pir_records += 1
            return f"{line.rstrip()} {next(handle, '')}"
        return line

    def _note_leading(self, text: str) -> None:
        self.num_leading_lines += 1
        if self.num_leading_lines > 1:
            return
        self._first_leading = _excerpt(text)
        for pattern, name in _FOREIGN_FIRST_LINE:
            if re.match(pattern, text):
                raise UserError(f"{self.path} is not FASTA but {name}: it begins with {self._first_leading!r}.")

    def _what_it_begins_with(self) -> str:
        return f" (it begins with {self._first_leading!r})" if self._first_leading else " and it holds only blank lines"


# Header of a PIR/NBRF entry: a two-letter type, a semicolon, the id (Biopython, Bio/SeqIO/PirIO.py, lists the types).
_PIR_HEADER = re.compile(r">(?:P1|F1|D1|DL|DC|RL|RC|N1|N2|N3|XX);\S")

_FOREIGN_MAGIC = (
    (b"PAR1", "a Parquet file: give it a name that ends in .parquet"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"\xfd7zXZ\0", "xz-compressed: unpack it first"),
    (b"\x1f\x9d", "an old compress (.Z) file: unpack it first"),
)
_FOREIGN_FIRST_LINE = (
    (r"# STOCKHOLM", "a Stockholm alignment"),
    (r"CLUSTAL", "a Clustal alignment"),
    (r"#NEXUS", "a NEXUS file"),
    (r"\d+\s+\d+$", "a PHYLIP alignment"),
    (r"LOCUS\s", "a GenBank or GenPept file"),
    (r"ID\s{3}", "an EMBL or Swiss-Prot file"),
    (r"(HEADER|ATOM)\s", "a PDB file"),
    (r"data_", "an mmCIF file"),
    (r"@", "FASTQ or SAM"),
    (r"##gff", "a GFF file"),
    (r"<", "HTML or XML"),
    (r"[\[{]", "JSON"),
)


def _decompressed(raw: io.BufferedReader, path: Path) -> tuple[Any, str]:
    """A buffered stream of the text's bytes, and what it is unpacked from. No further buffer goes around it: one that
    fills itself before it passes bytes on would lose what comes before a cut, and with it the record's number."""
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw), "gzip"
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(raw), "bzip2"
    if magic == b"\x28\xb5\x2f\xfd":
        return _open_zstd(raw, path), "Zstandard"
    return raw, ""


def _open_zstd(raw: IO[bytes], path: Path) -> Any:
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdFile

        return ZstdFile(raw)
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} is Zstandard-compressed: `pip install zstandard` to read it, or unpack it.") from None
    return io.BufferedReader(_ZstdFrames(raw, zstandard))


class _ZstdFrames(io.RawIOBase):
    """Zstandard frames as one stream; unlike zstandard's own reader it says when the last frame is cut."""

    def __init__(self, raw: IO[bytes], zstandard: Any):
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(1 << 17)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("a Zstandard frame is cut")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        num_bytes = min(len(buffer), len(self._ready))
        buffer[:num_bytes] = self._ready[:num_bytes]
        self._ready = self._ready[num_bytes:]
        return num_bytes


def _record(title: str, sequence: str, number: int) -> Record:
    # NCBI joins the headers of identical proteins by Ctrl-A; each further one is shown as its tools do, after " >".
    words = _decode(title).replace("\x01", " >").split(maxsplit=1)
    if not words:
        return Record(f"record_{number}", "", sequence)
    return Record(words[0], words[1].strip() if len(words) > 1 else "", sequence)


def _decode(text: str) -> str:
    """Surrogates of bytes that were not UTF-8, read as Latin-1 instead."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogateescape").decode("latin-1")


def _readable(character: str) -> str:
    return chr(ord(character) - 0xDC00) if 0xDC80 <= ord(character) <= 0xDCFF else character


def _excerpt(text: str, width: int = 40) -> str:
    text = _decode(text).strip()
    return text if len(text) <= width else text[: width - 3] + "..."


def _lines(count: int) -> str:
    return f"{count:,} line{'' if count == 1 else 's'}"
