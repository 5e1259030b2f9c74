"""An exported encoder in ONNX Runtime, without torch and transformers: proteins in, vectors out, on CPUs.

One protein is one call, so that nothing is padded, and there is one thread to a call and as many calls at a time as
there are threads: a core is busy with one protein.

Dimensions: B proteins, L tokens of a protein, R residues of all proteins, D width.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.models.families import Spelling
from hf_plm.models.locate import ENCODER_FILE
from hf_plm.models.threads import calls_at_once

FORMAT = 1
"""Of the folder. Raised when an older one can no longer be read, or would give other numbers."""
GRAPH_FILES = {False: "model.onnx", True: "model_int8.onnx"}
"""By whether it is in int8."""


class OnnxEncoder:
    """An encoder ready to use, from a folder that `graphs.write_graphs` has written.

    `encode` may be called from several threads at once, `num_calls` of them with profit. `threads` are the cores to
    use, all of this process's where it is left out.
    """

    def __init__(self, folder: Path, is_int8: bool, threads: int | None = None):
        plain = _read_facts(folder)
        self.spelling = Spelling.from_json(plain["spelling"])
        self.width, self.limit, self.layer = (int(plain[name]) for name in ("width", "limit", "layer"))
        self.facts: dict[str, str] = plain["facts"] | {"backend": "onnx", "precision": "int8" if is_int8 else "fp32"}
        self.has_cls = self.facts.get("cls") != "none"
        self.num_calls, threads_per_call = calls_at_once(threads)
        self.tokens_per_call = 1  # one protein
        path = folder / GRAPH_FILES[is_int8]
        if not path.is_file():
            why = f": its vectors had a cosine of {plain['int8_cosine']:.2f} to those of fp32" if is_int8 else ""
            raise UserError(f"{folder} holds no {path.name}{why}.")
        self._session = open_session(path, threads_per_call)

    def prepare_thread(self) -> None:
        """To be called once in each thread that will call `encode`: here there is nothing to do."""

    def leave_threads(self) -> None:
        """To be called where those threads have ended: nothing either."""

    def encode(self, proteins: Sequence[bytes], wants: Collection[str]) -> dict[str, np.ndarray]:
        """float32 arrays by the names in `wants`: "none" (R, D), the residues of all proteins end to end; "mean", "max"
        (B, D), over the residues of each; "cls" (B, D), its first token.

        Each is 1 to `limit` residues as `fasta.clean` leaves them.
        """
        lengths = [len(residues) for residues in proteins]
        assert all(0 < length <= self.limit for length in lengths), "the tables of a graph end at the limit"
        found = {
            name: np.empty((sum(lengths) if name == "none" else len(proteins), self.width), np.float32)
            for name in wants
        }
        first, begin = len(self.spelling.prefix), 0
        for index, (residues, length) in enumerate(zip(proteins, lengths, strict=True)):
            hidden_LD = self._session.run(["hidden"], {"input_ids": self.spelling.encode(residues)[None]})[0][0]
            residues_ND = hidden_LD[first : first + length]
            if "none" in found:
                found["none"][begin : begin + length] = residues_ND
            if "mean" in found:
                residues_ND.mean(0, out=found["mean"][index])
            if "max" in found:
                residues_ND.max(0, out=found["max"][index])
            if "cls" in found:
                found["cls"][index] = hidden_LD[0]
            begin += length
        return found


def open_session(path: Path, num_threads: int) -> Any:
    """An `onnxruntime.InferenceSession` on CPUs. Raises `UserError` without ONNX Runtime or where it cannot open it."""
    try:
        import onnxruntime  # type: ignore[import-untyped,import-not-found]
    except ImportError as error:
        raise UserError('This needs onnxruntime, which is not installed: pip install "hf_plm[onnx]".') from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = num_threads
    # Plans of memory are kept for each length, which takes more of it (T5, 2,000 proteins: 285 MB, not 253) and no less
    # time. Without the arena, memory would be asked for anew in each call: 20% of the time of a T5.
    options.enable_mem_pattern = False
    # Threads without work sleep, for other calls have some.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _may_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own, derived from nothing narrower
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{path} cannot be opened by ONNX Runtime {onnxruntime.__version__}: {reason}") from error


def _may_overflow() -> bool:
    """Whether this may be an x86 CPU without VNNI, where int8 products are added up in 16 bits and overflow.

    ONNX Runtime then takes a slower way, if it is told to; told so on a CPU with VNNI, it takes that way there too (8M,
    350 residues: 52 ms, not 34). On other processors it makes no difference.
    """
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / ENCODER_FILE
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no exported encoder: {ENCODER_FILE} is missing or cannot be read.") from None
    found = plain.get("format") if isinstance(plain, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path} is of format {found}, where this hf_plm reads {FORMAT}; delete the folder to have it made anew."
        )
    return plain
