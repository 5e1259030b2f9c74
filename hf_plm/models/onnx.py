"""The model for ONNX Runtime: a folder with `model.onnx`, in the layout that `optimum` and plain users expect.

Any number of sequences of any length go in. The file is run in ONNX Runtime before it gets its name, against torch on
short and long sequences, with and without `<mask>`, alone and padded: an exporter may fix what depends on the data, and
one example would not show it. The exporter's notes of where each line of code lies on this machine are taken out.
"""

import contextlib
import copy
import importlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import BatchEncoding, EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.proteins.tokenizer import ProteinTokenizer
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES

MODEL_FILE = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference to torch, relative to the largest logit or 1. Found, on one CPU core with random weights: 1.8e-6
(150m) and 1.5e-6 (8m), and 2.3e-5 (8m) with weights so large that a network amplifies every rounding."""


def write_onnx(model: EsmForMaskedLM, folder: str | Path) -> Path:
    """Writes the ONNX folder of a whole, unsharded model (any device and precision), in fp32, and returns its path.

    `model.onnx` takes `input_ids` and `attention_mask`, int64 (B, L), and gives `logits` (B, L, V); beside it are the
    configuration and the tokenizer, and above 1.5 GB the weights in a second file that belongs to it. Raises
    `UserError` where a package is missing, or `folder` is not empty or cannot be written, and `RuntimeError` where ONNX
    Runtime computes otherwise than torch; then nothing is left behind.
    """
    _require_packages()
    folder = Path(folder).resolve()
    temporary = folder.with_name(f".{folder.name}.writing")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; name another folder for {MODEL_FILE}, or move that away.")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        temporary.mkdir(parents=True)
        # A copy, because the exporter needs another implementation of attention, precision and device than training.
        model = copy.deepcopy(model).to("cpu", torch.float32).eval()
        model.set_attn_implementation("sdpa")
        _export(model, temporary / MODEL_FILE)
        model.config.architectures, model.config.dtype = ["EsmForMaskedLM"], torch.float32
        model.config.save_pretrained(temporary)
        ProteinTokenizer().save_pretrained(temporary)
        difference = onnx_difference(temporary / MODEL_FILE, model)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{folder} was not written: its logits in ONNX Runtime are off by {difference:.1e}.")
        for path in temporary.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"The ONNX folder {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@torch.no_grad()
def onnx_difference(path: Path, model: EsmForMaskedLM) -> float:
    """The largest difference between the logits of the file and of an fp32 model, relative to the largest or to 1.

    Over residues, `<cls>` and `<eos>` of seven batches, the longest sequence of 1,102 tokens, where ESM-2 was trained
    on up to 1,026; padding has logits of no meaning.
    """
    import onnxruntime  # type: ignore[import-untyped,import-not-found]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about nodes of the exporter's
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    difference, largest = 0.0, 1.0
    for batch in _probes():
        is_token_BL = batch["attention_mask"].bool()
        expected_BLV = model(**batch).logits
        found_BLV = torch.from_numpy(session.run(["logits"], {name: x.numpy() for name, x in batch.items()})[0])
        difference = max(difference, (found_BLV - expected_BLV)[is_token_BL].abs().max().item())
        largest = max(largest, expected_BLV[is_token_BL].abs().max().item())
    return difference / largest


def _probes() -> Iterator[BatchEncoding]:
    """Batches of random residues from 1 to 1,100, each alone without `<mask>` and with; then several, padded."""
    generator = torch.Generator().manual_seed(0)

    def protein(length: int, num_masks: int = 0) -> str:
        letters = [STANDARD_RESIDUES[i] for i in torch.randint(20, (length,), generator=generator)]
        for i in torch.randperm(length, generator=generator)[:num_masks]:
            letters[i] = "<mask>"
        return "".join(letters)

    rows = [[protein(1)], [protein(5, 2)], [protein(64)], [protein(300, 45)], [protein(1100)]]
    rows += [[protein(5), protein(64, 9), protein(30, 29)], [protein(7, 1), protein(7)]]
    for sequences in rows:
        yield ProteinTokenizer()(sequences, padding=True, return_tensors="pt")


def _export(model: EsmForMaskedLM, path: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.export import Dim

    example = ProteinTokenizer()(["MKTV<mask>RQ", "MKTVRQAAAW"], padding=True, return_tensors="pt")
    axes = {0: Dim("batch"), 1: Dim("sequence")}
    with _quiet_exporter():
        program = torch.onnx.export(
            model,
            kwargs=dict(example),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            # The second input's axes are found to be the first's; named again, they would be warned about.
            dynamic_shapes={"input_ids": axes, "attention_mask": {0: Dim.AUTO, 1: Dim.AUTO}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    program.save(path)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without two remarks of torch's about itself: a class it will rename, and operators of a torchvision not there."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _require_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f'Writing ONNX needs {name}, which is not installed: pip install "hf_plm[onnx]".'
            ) from error
