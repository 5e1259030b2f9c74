"""Models of a folder as transformers has them, fp32 on the CPU; what can be wrong with one is told in a sentence."""

import inspect
import json
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
)

from hf_plm.config import UserError
from hf_plm.models.families import Spelling, family_of, spelling_of
from hf_plm.models.hub import quiet_loading

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_VOCABULARY = 2000
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "spiece.model")
HEADLESS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForProteinFolding")
"""How classes are called that have no head which predicts residues."""


def open_encoder(folder: Path, name: str) -> tuple[PreTrainedModel, Spelling, dict[str, str]]:
    """The stock encoder of a folder (fp32, on the CPU), its spelling, and what to say of it."""
    config = _open_config(folder)
    tokenizer = _open_tokenizer(folder, config)
    family = family_of(config, tokenizer)
    spelling = spelling_of(family, tokenizer)
    if len(tokenizer) > LARGEST_VOCABULARY:
        print(
            f"warning: {name} has a vocabulary of {len(tokenizer):,} tokens, as no model of proteins has; its vectors "
            "may mean nothing",
            file=sys.stderr,
        )
    opener = AutoModelForTextEncoding if family.is_encoder_decoder else AutoModel
    model = _open_model(folder, config, opener)
    return model, spelling, {"model": name, "family": family.name, "cls": "first" if family.has_cls else "none"}


def open_stock_masked_lm(folder: Path, name: str) -> tuple[PreTrainedModel, Spelling, dict[str, str], int]:
    """The stock masked language model of a folder (fp32, on the CPU), its spelling, what to say of it, `<mask>`'s id.

    Raises `UserError` for a folder that cannot be opened, and for a model that has no head which predicts residues.
    """
    config, spelling, mask_id, family = masked_lm_parts(folder, name)
    model = _open_model(folder, config, AutoModelForMaskedLM)
    return model, spelling, {"model": name, "family": family}, mask_id


def masked_lm_parts(folder: Path, name: str) -> tuple[Any, Spelling, int, str]:
    """All but the weights: configuration, spelling, the id of `<mask>`, family. Errors as above."""
    config = _open_config(folder)
    tokenizer = _open_tokenizer(folder, config)
    family = family_of(config, tokenizer)
    if family.is_encoder_decoder or tokenizer.mask_token_id is None:
        raise UserError(
            f"{name} ({family.name}) is no masked language model: it has no <mask> and no head that predicts a "
            "residue, which this needs; hf-plm embed and probe take it."
        )
    kinds = getattr(config, "architectures", None) or []
    if kinds and all(kind.endswith(HEADLESS) for kind in kinds):
        raise UserError(
            f"{name} is a {kinds[0]}, which has no head that predicts residues, as a masked language model has; "
            "hf-plm embed and probe take it."
        )
    return config, spelling_of(family, tokenizer), int(tokenizer.mask_token_id), family.name


def pick_device(name: str) -> torch.device:
    """The device of a name such as `cuda:1`; `auto` is the GPU of this process, Apple's, or the CPU."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(f"The device {name!r} is not to be had here; --device auto takes what there is.") from None
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is fp32, but bf16 on a GPU that computes in it; fp16 is for who knows that the model bears it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32"


def _open_config(folder: Path) -> Any:
    try:
        plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = (plain.get("architectures") or [""])[0]
        if "model_type" not in plain and architecture.startswith("Bert"):  # Rostlab/prot_bert says no more
            return BertConfig.from_pretrained(folder)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no model: it should have config.json, weights and a tokenizer.") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder} cannot be opened as a model: {_one_line(error)}") from None


def _open_tokenizer(folder: Path, config: Any) -> Any:
    try:
        with quiet_loading():
            return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
            for package in ("sentencepiece", "google.protobuf"):
                try:
                    __import__(package)
                except ImportError:
                    raise UserError(
                        f"The tokenizer of {folder} (spiece.model) needs two more packages: "
                        'pip install "hf_plm[sentencepiece]".'
                    ) from None
        if not any((folder / one).is_file() for one in TOKENIZER_FILES):
            raise UserError(
                f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); save it beside the model."
            ) from None
        raise UserError(f"The tokenizer of {folder} cannot be opened: {_one_line(error)}") from None


def _open_model(folder: Path, config: Any, opener: Any) -> PreTrainedModel:
    has_safetensors = any(folder.glob("model*.safetensors"))
    if not has_safetensors and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} holds no weights: neither model*.safetensors nor pytorch_model*.bin.")
    options: dict[str, Any] = {}
    kind = MODEL_MAPPING.get(type(config), None)
    if opener is AutoModel and kind and "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        options["add_pooling_layer"] = False  # masked language models are saved without it
    try:
        with quiet_loading(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A .bin is opened by torch's own unpickler, which builds tensors and calls nothing else.
            model, info = opener.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=has_safetensors,
                weights_only=True,
                ignore_mismatched_sizes=True,  # told below, with the name
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder} cannot be opened as a model: {_one_line(error)}") from None
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    if missing := sorted([*info["missing_keys"], *mismatched]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks weights of the shape that its config.json promises: {missing[0]}{more}.")
    return model


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
