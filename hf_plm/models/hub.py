"""The folder that others load: a stock `EsmForMaskedLM`, a tokenizer that `AutoTokenizer` opens, and a model card.

Written under a temporary name, opened through transformers' Auto classes, compared weight by weight, and only then
renamed: reading everything back costs a few seconds for 650M parameters, and a folder that is there is right. The keys
are those of the published ESM-2 files, so transformers 4.57 loads it as well as 5.x; there is no code in it, no pickle,
and no trace of how it was trained.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import ModelCardData, save_torch_state_dict
from safetensors import SafetensorError
from transformers import AutoModelForMaskedLM, AutoTokenizer, EsmConfig, EsmForMaskedLM
from transformers.utils import logging as transformers_logging

from hf_plm.config import UserError
from hf_plm.proteins.tokenizer import ProteinTokenizer
from hf_plm.proteins.vocabulary import RESIDUES

ROTARY_KEY = "rotary_embeddings.inv_freq"
TIED_KEY = "lm_head.decoder.weight"
EMBEDDING_KEY = "esm.embeddings.word_embeddings.weight"
PROBE = RESIDUES[:9] + "<mask>" + RESIDUES[10:]
PROBE_TOLERANCE = 1e-5


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' progress bars: loading a local file is not worth a line."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
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


def save_hub_folder(model: EsmForMaskedLM, folder: str | Path, card: str) -> Path:
    """Writes the Hub folder of a whole, unsharded model (any device and precision) and returns its path.

    A folder of an earlier save is replaced when the new one has been verified. Raises `UserError` where `folder` holds
    something else or cannot be written, and `RuntimeError` where what was written does not read back the same; then
    nothing is left behind and what was there before stays. The weights are one file up to 5 GB, then several.
    """
    folder = Path(folder).resolve()
    temporary = folder.with_name(f".{folder.name}.writing")
    try:
        if folder.exists() and not _is_hub_folder(folder) and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not a Hub folder; name another one, or move it away.")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        temporary.mkdir(parents=True)
        weights = published_state_dict(model)
        config = _export_config(model)
        config.save_pretrained(temporary)
        save_torch_state_dict(weights, temporary, metadata={"format": "pt"})
        ProteinTokenizer().save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
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
    if not _is_hub_folder(path):
        raise UserError(f"{path} is not a Hub folder: it should hold config.json and model.safetensors.")
    try:
        model, faults = _load_stock(path)
        tokenizer = ProteinTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
    if faults:
        raise UserError(f"{path} does not fit its config.json: {faults}.")
    if not isinstance(model, EsmForMaskedLM):
        raise UserError(f"{path} holds a {type(model).__name__}, but an EsmForMaskedLM (ESM-2) was expected.")
    return model, tokenizer


def _is_hub_folder(path: Path) -> bool:
    has_weights = (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()
    return has_weights and (path / "config.json").is_file()


def _load_stock(path: Path) -> tuple[torch.nn.Module, str]:
    """The model as anyone would load it, and what transformers found wrong with the file, in words, or ''."""
    with _quiet_loading():
        model, info = AutoModelForMaskedLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    faults = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    return model, "; ".join(f"{kind} weights: {', '.join(keys)}" for kind, keys in faults.items() if keys)


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


def model_card(
    *,
    name: str,
    preset: str,
    num_parameters: int,
    data_name: str,
    data_hash: str,
    split_kind: str,
    num_steps: int,
    num_tokens: int,
    validation_loss: float | None,
    context_free_loss: float | None,
    validation_loss_masked: float | None,
    unigram_entropy: float | None,
    versions: dict[str, str],
    is_simulated: bool = False,
) -> str:
    """The README.md of a Hub folder, from plain values; losses in nats per target, None where not measured.

    The front matter names no license: the Hub takes a card without one, and it is the author's to choose.
    """
    front_matter = ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["biology", "protein", "protein-language-model", "esm", "hf_plm"],
    ).to_yaml()
    simulated = "**The sequences are simulated, not natural: this model is a demonstration.** " if is_simulated else ""
    relatives = "; relatives of held-out sequences may be in the training data" if split_kind == "random" else ""
    return f"""---
{front_matter}
---

# {name}

A protein language model: ESM-2 architecture (`EsmForMaskedLM`), size `{preset}`, {num_parameters:,} parameters,
pretrained from random weights by masked-language modelling.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Training

| | |
|---|---|
| data | {data_name} (hash `{data_hash}`) |
| held out | {split_kind}{relatives} |
| steps | {num_steps:,} |
| tokens | {num_tokens:,} |
| software | {", ".join(f"{package} {version}" for package, version in versions.items())} |

## What it learned

Losses on held-out sequences, in nats per target. A predictor without any context reaches the baseline; a model that has
learned from context is under it.

| | model | baseline without context |
|---|---|---|
| all targets | {_nats(validation_loss)} | {_nats(context_free_loss)} |
| `<mask>` inputs only | {_nats(validation_loss_masked)} | {_nats(unigram_entropy)} |

## Limits

{simulated}The model saw what is in its training data and nothing else; its likelihoods are no measurement of function,
stability or safety. The contact head is in the file because the architecture has one, and is untrained. Sequences are
upper-case letters, one per residue; `J` is written `X`. No license has been chosen: add `license:` above before you
publish.
"""


def _nats(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"
