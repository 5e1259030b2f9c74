"""Published weights as a place to start from: a Hub folder, a repository on the Hub, or a fair-esm file.

Nothing is left at random: weights that do not fit the network to the last key are refused.
"""

import hashlib
from pathlib import Path

from transformers import EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.models.hub import is_hub_folder, load_hub_folder, sha256
from hf_plm.models.presets import esm_config, preset_of
from hf_plm.remote import download, is_repository

FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "vocab.txt",
    "tokenizer_config.json",
    "README.md",
    "*.png",
]
# What the packed forward and the exports take for granted; esm_config has it as the published ESM-2 files do.
_SAME = (
    "vocab_size",
    "position_embedding_type",
    "emb_layer_norm_before",
    "layer_norm_eps",
    "mask_token_id",
    "pad_token_id",
    "hidden_act",
    "tie_word_embeddings",
)


def find_published(name: str) -> Path:
    """The folder or file of a name; what is on the Hub is downloaded, once. Raises `UserError` where there is none."""
    path = Path(name).expanduser()
    if not name or "://" in name:
        raise UserError(f"Weights are a folder, a .pt file or a repository such as user/model, not {name!r}.")
    if path.exists():
        return path / "hub" if is_hub_folder(path / "hub") and not is_hub_folder(path) else path
    if name.endswith(".pt") or not is_repository(name):
        raise UserError(f"There are no weights {name}: neither a file, a folder, nor a repository such as user/model.")
    try:
        return download(name, "model", FILES)
    except UserError as error:
        raise UserError(f"{name} is no file or folder here, and: {error}") from None


def identity(path: Path) -> str:
    """sha256 of published weights: that of their file, or of the several files' in the order of their names."""
    if path.is_file():
        return sha256(path)
    hashes = [sha256(file) for file in sorted(path.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def read_published(path: Path) -> EsmForMaskedLM:
    """The model (fp32, on the CPU) of a Hub folder or a fair-esm `.pt`, its contact head frozen as `build_model` does.

    Raises `UserError` where a weight is missing, one too many or of another shape, and for another network than ESM-2.
    """
    if path.is_file():
        from hf_plm.models.fair_esm import read_fair_esm

        return read_fair_esm(path)
    model, _ = load_hub_folder(path)
    expected = esm_config(preset_of(model.config))
    for name in _SAME:
        found, wanted = getattr(model.config, name, None), getattr(expected, name)
        if found != wanted:
            raise UserError(f"{path} is no ESM-2 as published: its {name} is {found!r}, not {wanted!r}.")
    if model.config.intermediate_size != expected.intermediate_size:
        raise UserError(f"{path} has an intermediate size of {model.config.intermediate_size}, not 4 x its width.")
    model.esm.contact_head.requires_grad_(False)
    return model
