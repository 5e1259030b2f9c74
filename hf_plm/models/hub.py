"""The folder that others load: a stock `EsmForMaskedLM`, a tokenizer that `AutoTokenizer` opens, and a model card.

Written under a temporary name, opened through transformers' Auto classes, compared weight by weight, and only then
renamed: reading everything back costs a few seconds for 650M parameters, and a folder that is there is right. The keys
are those of the published ESM-2 files, so transformers 4.57 loads it as well as 5.x; there is no code in it, no pickle,
and no trace of how it was trained.
"""

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, save_torch_state_dict
from huggingface_hub.utils import logging
from safetensors import SafetensorError
from transformers import AutoModelForMaskedLM, AutoTokenizer, EsmConfig, EsmForMaskedLM
from transformers.utils import logging as transformers_logging

from hf_plm.config import UserError
from hf_plm.proteins.tokenizer import ProteinTokenizer
from hf_plm.proteins.vocabulary import RESIDUES

ROTARY_KEY = "rotary_embeddings.inv_freq"
TIED_KEY = "lm_head.decoder.weight"
EMBEDDING_KEY = "esm.embeddings.word_embeddings.weight"
CARD = "README.md"
PROBE = RESIDUES[:9] + "<mask>" + RESIDUES[10:]
PROBE_TOLERANCE = 1e-5


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bars and reports: what is wrong with a folder is told by an error of ours."""
    was_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()


def published_state_dict(model: EsmForMaskedLM) -> dict[str, torch.Tensor]:
    """The weights in fp32 on the CPU, under the keys of `facebook/esm2_*`.

    transformers 5 keeps one table of rotary frequencies for the model; the published files have one in each layer, and
    that is what every version reads. The decoder is left out, as `save_pretrained` does: it is the word embedding.
    """
    weights = {}
    for key, tensor in model.state_dict().items():
        if key.endswith(ROTARY_KEY):
            for layer in range(model.config.num_hidden_layers):
                # A copy each, because safetensors refuses tensors that share memory.
                layer_key = f"esm.encoder.layer.{layer}.attention.self.{ROTARY_KEY}"
                weights[layer_key] = tensor.detach().to("cpu", torch.float32, copy=True)
        elif key != TIED_KEY:
            weights[key] = tensor.detach().to("cpu", torch.float32).contiguous()
    return weights


def _export_config(model: EsmForMaskedLM) -> EsmConfig:
    config = copy.deepcopy(model.config)
    config.architectures = ["EsmForMaskedLM"]
    config.dtype = torch.float32
    return config


def save_hub_folder(
    model: EsmForMaskedLM, folder: str | Path, card: str, extras: Mapping[str, Path] | None = None
) -> Path:
    """Writes the Hub folder of a whole, unsharded model (any device and precision) and returns its path.

    The checksums of its files are added to `card`; `extras` are files to put beside them, by the names they get. A
    folder of an earlier save is replaced when the new one has been verified. Raises `UserError` where `folder` holds
    something else or cannot be written, and `RuntimeError` where what was written does not read back the same; then
    nothing is left behind and what was there before stays. The weights are one file up to 5 GB, then several.
    """
    folder = Path(folder).resolve()
    temporary = folder.with_name(f".{folder.name}.writing")
    try:
        if strange := _not_ours(folder):
            raise UserError(f"{folder} holds {strange}, which would be lost; name another folder, or move that away.")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        temporary.mkdir(parents=True)
        weights = published_state_dict(model)
        config = _export_config(model)
        config.save_pretrained(temporary)
        save_torch_state_dict(weights, temporary, metadata={"format": "pt"})
        ProteinTokenizer().save_pretrained(temporary)
        for name, path in (extras or {}).items():
            shutil.copyfile(path, temporary / name)
        (temporary / CARD).write_text(card.rstrip() + "\n" + _checksums(temporary), encoding="utf-8")
        _verify(temporary, config, weights)
        _sync(temporary)
        _replace(folder, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The Hub folder {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_hub_folder(path: str | Path) -> tuple[EsmForMaskedLM, ProteinTokenizer]:
    """The model (fp32, on the CPU, in evaluation mode) and the tokenizer of a Hub folder on disk.

    Raises `UserError` if the folder is not there, is no ESM-2 masked language model, has no safetensors, or lacks a
    weight or has one too many: a model with a part left at random would otherwise be used without a word.
    """
    path = Path(path)
    if not is_hub_folder(path):
        raise UserError(f"{path} is not a Hub folder: it should hold config.json and model.safetensors.")
    try:
        model, faults = _load_stock(path)
        tokenizer = ProteinTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
    if faults:
        hint = " It was saved without the language-model head." if faults.startswith("missing weights: lm_head") else ""
        raise UserError(f"{path} does not fit its config.json: {faults}.{hint}")
    if not isinstance(model, EsmForMaskedLM):
        raise UserError(f"{path} holds a {type(model).__name__}, but an EsmForMaskedLM (ESM-2) was expected.")
    return model, tokenizer


def check_hub_folder(folder: str | Path) -> None:
    """Raises `UserError` unless a Hub folder is whole.

    It opens through the Auto classes with every weight in its place, its weights are finite numbers, and its files have
    the checksums that its card names, if there is one; the card itself is the author's to edit.
    """
    folder = Path(folder)
    model, _ = load_hub_folder(folder)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{folder} has weights that are not numbers ({name}); it is not passed on.")
    with torch.no_grad():
        if not model(**ProteinTokenizer()(PROBE, return_tensors="pt")).logits.isfinite().all():
            raise UserError(f"{folder} gives logits that are not numbers; it is not passed on.")
    text = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    for name, expected in checksums_in(text).items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name} is not the file that the model card names by its checksum; export it again "
                "(hf-plm export), or correct the card."
            )


def _not_ours(folder: Path) -> str:
    """A file or folder in the place of a Hub folder that no earlier save has put there, or ''."""
    if not folder.exists():
        return ""
    card = folder / CARD
    saved = {CARD, *(checksums_in(card.read_text(encoding="utf-8")) if card.is_file() else ())}
    return next((path.name for path in sorted(folder.iterdir()) if path.name not in saved), "")


def check_for_others(folder: Path) -> None:
    """Raises `UserError` unless the folder has what others need: a tokenizer, and a card with front matter."""
    remedy = f"hf-plm export {folder} --out NEW_FOLDER writes a whole one"
    if not (folder / "vocab.txt").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer; {remedy}.")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer(PROBE)["input_ids"] != ProteinTokenizer()(PROBE)["input_ids"]:
        raise UserError(f"The tokenizer of {folder} gives other ids than ESM-2's.")
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} has no model card ({CARD}); {remedy}.")
    logging.set_verbosity_error()  # of a card without front matter, which is told below
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front_matter = ModelCard(text).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The model card {folder / CARD} cannot be read ({reason}); correct its front matter."
        ) from None
    if not front_matter:
        raise UserError(f"The model card {folder / CARD} has no front matter, which the Hub reads.")


def _checksums(folder: Path) -> str:
    """A section of the card: the sha256 of every file but the card."""
    rows = "".join(f"| `{path.name}` | `{sha256(path)}` |\n" for path in sorted(folder.iterdir()) if path.name != CARD)
    return f"\n## Files\n\n| file | sha256 |\n|---|---|\n{rows}"


_CHECKSUM_ROW = re.compile(r"^\| `([\w.-]+)` \| `([0-9a-f]{64})` \|$", re.MULTILINE)
_CHECKSUM_TABLE = re.compile(r"\n## Files\n\n\| file \| sha256 \|\n\|---\|---\|\n(\| `[^`]+` \| `[0-9a-f]{64}` \|\n)*")


def checksums_in(card: str) -> dict[str, str]:
    """What a card says of the files beside it: sha256 by name."""
    return dict(_CHECKSUM_ROW.findall(card))


def without_checksums(card: str) -> str:
    return _CHECKSUM_TABLE.sub("", card)


def sha256(path: Path) -> str:
    """The checksum of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_hub_folder(path: Path) -> bool:
    """Whether a folder looks like one; `check_hub_folder` looks closer."""
    has_weights = (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()
    return has_weights and (path / "config.json").is_file()


def _load_stock(path: Path) -> tuple[torch.nn.Module, str]:
    """The model as anyone would load it, and what transformers found wrong with the file, in words, or ''."""
    with quiet_loading():
        model, info = AutoModelForMaskedLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, with the names
            output_loading_info=True,
        )
    faults = []
    for kind in ("mismatched", "missing", "unexpected"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"])
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            faults.append(f"{kind} weights: {', '.join(keys[:3])}{more}")
    return model, "; ".join(faults)


def _verify(folder: Path, config: EsmConfig, weights: dict[str, torch.Tensor]) -> None:
    """Raises `RuntimeError` unless the folder, opened as others open it, is the model that was to be written."""
    model, faults = _load_stock(folder)
    if faults or type(model) is not EsmForMaskedLM:
        raise RuntimeError(f"The Hub folder was not written: it reads back as {type(model).__name__}, {faults}.")
    found = published_state_dict(model)
    differing = [key for key in weights.keys() | found.keys() if not _same(weights.get(key), found.get(key))]
    if differing:
        raise RuntimeError(f"The Hub folder was not written: these weights read back otherwise: {sorted(differing)}.")
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in saved or any("attn" in key for key in saved) or saved["architectures"] != ["EsmForMaskedLM"]:
        raise RuntimeError("The Hub folder was not written: its config.json is not that of a stock EsmForMaskedLM.")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    probe = ProteinTokenizer()(PROBE, return_tensors="pt")
    if tokenizer(PROBE)["input_ids"] != probe["input_ids"][0].tolist():
        raise RuntimeError("The Hub folder was not written: its tokenizer gives other ids than the training's.")
    # Built around the tensors that were to be written, so that it costs no memory of its own.
    with torch.device("meta"):
        expected = EsmForMaskedLM(config).eval()
    expected.load_state_dict({**weights, TIED_KEY: weights[EMBEDDING_KEY]}, assign=True)
    with torch.no_grad():
        difference = (model(**probe).logits - expected(**probe).logits).abs().max().item()
    if not difference <= PROBE_TOLERANCE:
        raise RuntimeError(f"The Hub folder was not written: its logits on a probe are off by {difference:.1e}.")


def _same(expected: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    return expected is not None and found is not None and torch.equal(expected, found)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _replace(folder: Path, new: Path) -> None:
    """Puts `new` in the place of `folder`. Between two renames the place is empty, but never half full."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    # Also removes one whose run was killed between the renames.
    shutil.rmtree(old, ignore_errors=True)
