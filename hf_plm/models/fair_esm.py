"""ESM-2 files of fair-esm (`.pt`), read and written, so that models go both ways between it and transformers.

A model is two files, NAME.pt and NAME-contact-regression.pt, both pickles. They are opened with torch's own unpickler,
which builds tensors and plain containers and calls nothing else; a file that needs more is refused. What is written is
read back and compared, weight by weight and on a probe, before it gets its name. Source of the format: fair-esm 2.0.0,
esm/pretrained.py (`load_model_and_alphabet_local`) and esm/model/esm2.py.
"""

import argparse
import copy
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import EsmConfig, EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.models.hub import EMBEDDING_KEY, PROBE, PROBE_TOLERANCE, TIED_KEY
from hf_plm.models.presets import esm_config
from hf_plm.proteins.tokenizer import ProteinTokenizer

_MODULES = {
    "emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
    "contact_head.regression": "esm.contact_head.regression",
}
_LAYER_MODULES = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}
_ROTARY_KEY = "esm.rotary_embeddings.inv_freq"
_ROTARY_TOLERANCE = 4e-3  # relative: a table rounded to bf16, the coarsest precision that a file may be in
_SETTINGS = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_attention_heads": "num_attention_heads",
    "token_dropout": "token_dropout",
}
# What fair-esm's ESM2 cannot be told, because it always has it.
_FIXED = ("vocab_size", "intermediate_size", "position_embedding_type", "emb_layer_norm_before", "layer_norm_eps")
_ONLY_ESM2 = "only fair-esm's files of ESM-2 are read"


def read_fair_esm(path: str | Path) -> EsmForMaskedLM:
    """The model of a fair-esm ESM-2 file and of the contact regression beside it: fp32, CPU, in evaluation mode.

    The rotary frequencies stay those of the file: in half precision they are rounded, and fair-esm computes with them
    so. The contact head is frozen, as `build_model` does. Raises `UserError` where a file is not there, damaged, of
    another model, or needs more than tensors to open, and where a weight is missing, unknown, misshapen or not tied.
    """
    path = Path(path)
    config, weights = _read_pair(path)
    model = _meta_model(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    table = _key_table(config.num_hidden_layers)
    faults = [f"{key} is missing" for key in table.keys() - weights.keys()]
    faults += [f"{key} is unexpected" for key in weights.keys() - table.keys()]
    for key in table.keys() & weights.keys():
        tensor, shape = weights[key], shapes[table[key]]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.shape != shape:
            faults.append(f"{key} is not a floating-point tensor of shape {shape}")
    if faults:
        more = f" and {len(faults) - 5} more faults" if len(faults) > 5 else ""
        raise UserError(f"{path} does not hold the ESM-2 of its settings: {'; '.join(sorted(faults)[:5])}{more}.")
    if not torch.equal(weights["lm_head.weight"], weights["embed_tokens.weight"]):
        raise UserError(f"{path} is no ESM-2 file: its lm_head.weight is not its embed_tokens.weight.")
    head_width = config.hidden_size // config.num_attention_heads
    frequencies = 10_000.0 ** -(torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    first = weights["layers.0.self_attn.rot_emb.inv_freq"]
    for key in (key for key, ours in table.items() if ours == _ROTARY_KEY):
        close = torch.allclose(weights[key].float(), frequencies, rtol=_ROTARY_TOLERANCE, atol=0)
        if not close or not torch.equal(weights[key], first):
            raise UserError(f"{path} is no ESM-2 file: {key} is not ESM-2's table of rotary frequencies.")
    _fill(model, {ours: weights[key].float() for key, ours in table.items()})
    model.esm.contact_head.requires_grad_(False)
    return model


def write_fair_esm(model: EsmForMaskedLM, path: str | Path) -> list[Path]:
    """Writes a whole, unsharded model (any device and precision), in fp32; returns the paths of its two files.

    fair-esm opens them; with torch 2.6 and newer, as for its published files, inside
    `torch.serialization.safe_globals([argparse.Namespace])`. Raises `UserError` where fair-esm would take the name for
    another model, where a file is there already or cannot be written, and for a model that is no ESM-2, and
    `RuntimeError` where what was written does not read back the same; then nothing is left behind.
    """
    path = Path(path).resolve()
    if not path.stem.startswith("esm2") or path.suffix != ".pt" or re.search("esm1v|esm_if", path.stem):
        name = re.sub(r"esm1v|esm_if|^esm2|\.pt$", "", path.name).strip("_")
        raise UserError(f"fair-esm tells a model by its file's name: {path.name} should be called esm2_{name}.pt.")
    expected = esm_config("8m", **_sizes({name: getattr(model.config, ours) for name, ours in _SETTINGS.items()}))
    if differing := [f for f in _FIXED if (getattr(model.config, f) or False) != (getattr(expected, f) or False)]:
        raise UserError(f"The model is not an ESM-2, and fair-esm has no other: its {', '.join(differing)} differ.")
    paths = [path, _regression_path(path)]
    if there := [each.name for each in paths if each.exists()]:
        raise UserError(f"{path.parent} already has {' and '.join(there)}; use another name or move that away.")
    temporary = path.with_name(f".{path.name}.writing")
    weights = {key: x.detach().to("cpu", torch.float32).contiguous() for key, x in model.state_dict().items()}
    placed: list[Path] = []
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        temporary.mkdir(parents=True)
        _save(temporary / path.name, model.config, weights)
        _verify(temporary / path.name, copy.deepcopy(model.config), weights)
        for each in reversed(paths):  # where the model is, its regression is
            (temporary / each.name).rename(each)
            placed.append(each)
    except OSError as error:
        for each in placed:
            each.unlink()
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return paths


def _key_table(num_layers: int) -> dict[str, str]:
    """fair-esm's keys, without prefix, to transformers'. There each layer has a rotary table, here the whole model."""
    modules = dict(_MODULES)
    table = {"embed_tokens.weight": EMBEDDING_KEY, "lm_head.weight": TIED_KEY, "lm_head.bias": "lm_head.bias"}
    for layer in range(num_layers):
        table[f"layers.{layer}.self_attn.rot_emb.inv_freq"] = _ROTARY_KEY
        for theirs, ours in _LAYER_MODULES.items():
            modules[f"layers.{layer}.{theirs}"] = f"esm.encoder.layer.{layer}.{ours}"
    for theirs, ours in modules.items():
        table |= {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}
    return table


def _regression_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}-contact-regression.pt")


def _sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """`esm_config`'s arguments from fair-esm's settings."""
    names = ("num_layers", "width", "num_heads", "token_dropout")
    return {ours: settings[name] for ours, name in zip(names, _SETTINGS, strict=True)}


def _read_pair(path: Path) -> tuple[EsmConfig, dict[str, Any]]:
    """The configuration, and everything that the two files call a weight, by its key without prefix."""
    data = _load(path)
    if "args" in data:  # ESM-1, ESM-1b, ESM-1v, the MSA Transformer and the inverse folding models
        raise UserError(f"{path} holds a model of kind {getattr(data['args'], 'arch', '?')!r}; {_ONLY_ESM2}.")
    settings = data["cfg"].get("model") if isinstance(data.get("cfg"), dict) else None
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    if not isinstance(settings, dict) or not isinstance(data.get("model"), dict):
        raise UserError(f"{path} has no settings under cfg.model or no weights under model; {_ONLY_ESM2}.")
    for name in _SETTINGS:
        expected = bool if name == "token_dropout" else int
        if type(settings.get(name)) is not expected:
            raise UserError(
                f"{path}: cfg.model.{name} is {settings.get(name)!r}, not {expected.__name__}; {_ONLY_ESM2}."
            )
    weights = {str(k).removeprefix("encoder.").removeprefix("sentence_encoder."): x for k, x in data["model"].items()}
    if len(weights) < len(data["model"]):
        raise UserError(f"{path} holds a weight twice, with the prefix encoder. and without.")
    regression = _regression_path(path)
    if regression.exists():
        head = _load(regression).get("model")
        if not isinstance(head, dict):
            raise UserError(f"{regression} has no weights under model.")
        weights |= head
    elif not any(key.startswith("contact_head.") for key in weights):
        raise UserError(f"{path} has no contact head: {regression}, which belongs beside it, is missing.")
    try:
        return esm_config("8m", **_sizes(settings)), weights
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a stranger's pickle, which is refused
            data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # damaged bytes make an unpickler raise nearly anything
        if refused := re.search(r"(?i)unsupported (?:global:? |class )+(\S+)", str(error)):
            raise UserError(
                f"{path} was not opened: it asks to run {refused[1]}, which no file of weights needs; {_ONLY_ESM2}."
            ) from error
        raise UserError(f"{path} is damaged, or no file of PyTorch's; {_ONLY_ESM2}.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__} instead of a model; {_ONLY_ESM2}.")
    return data


def _meta_model(config: EsmConfig) -> EsmForMaskedLM:
    with torch.device("meta"):
        return EsmForMaskedLM(config).eval()


def _fill(model: EsmForMaskedLM, weights: dict[str, torch.Tensor]) -> EsmForMaskedLM:
    """Puts the tensors themselves into a model without memory: no second copy of the weights, no random start."""
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    embeddings = model.esm.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1])[None]  # the one buffer that is in no file
    return model


def _save(path: Path, config: EsmConfig, weights: dict[str, torch.Tensor]) -> None:
    """The two files as fair-esm publishes them, flushed to the disk."""
    parts: dict[Path, dict[str, torch.Tensor]] = {path: {}, _regression_path(path): {}}
    for theirs, ours in _key_table(config.num_hidden_layers).items():
        if theirs.startswith("contact_head."):
            parts[_regression_path(path)][theirs] = weights[ours]
        else:
            prefix = "encoder." if theirs.startswith("lm_head.") else "encoder.sentence_encoder."
            parts[path][prefix + theirs] = weights[ours]
    settings = argparse.Namespace(**{name: getattr(config, ours) for name, ours in _SETTINGS.items()})
    for each, part in parts.items():
        head = {"cfg": {"model": settings}} if each == path else {}
        with each.open("wb") as file:
            torch.save({**head, "model": part}, file)
            file.flush()
            os.fsync(file.fileno())


def _verify(path: Path, config: EsmConfig, weights: dict[str, torch.Tensor]) -> None:
    """Raises `RuntimeError` unless the files, read back, are the model that was to be written."""
    found = read_fair_esm(path)
    read = found.state_dict()
    differing = sorted(key for key in weights.keys() | read.keys() if not _same(weights.get(key), read.get(key)))
    if differing:
        raise RuntimeError(f"{path.name} was not written: these weights read back otherwise: {differing}.")
    probe = ProteinTokenizer()(PROBE, return_tensors="pt")
    with torch.no_grad():
        difference = (found(**probe).logits - _fill(_meta_model(config), weights)(**probe).logits).abs().max().item()
    if not difference <= PROBE_TOLERANCE:
        raise RuntimeError(f"{path.name} was not written: its logits on a probe are off by {difference:.1e}.")


def _same(expected: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    return expected is not None and found is not None and torch.equal(expected, found)
