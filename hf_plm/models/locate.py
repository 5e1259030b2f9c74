"""Where a model is (a folder, a finished run, a repository on the Hub), and which revision of it.

Nothing here imports torch or transformers.
"""

import hashlib
import os
from pathlib import Path

from hf_plm.config import UserError
from hf_plm.remote import download, is_repository

ENCODER_FILE = "encoder.json"
"""What marks a folder that `hf-plm embed --backend onnx` wrote."""
FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
]
# Of models that have no safetensors (ProtT5, Ankh). Some repositories keep further copies of other names.
PICKLED = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]


def locate(name: str) -> Path:
    """The folder of a model; what is on the Hub is downloaded, once. Raises `UserError` where there is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / ENCODER_FILE).is_file() or (path / "config.json").is_file():
            return path
        if (path / "hub" / "config.json").is_file():
            return path / "hub"
        if (path / "config.yaml").is_file():
            raise UserError(
                f"The run in {name} is not finished; hf-plm export {name} --out FOLDER writes its newest checkpoint as "
                "a model, which can be embedded with."
            )
        raise UserError(f"{name} holds no model: it should have config.json, weights and a tokenizer.")
    if path.suffix in (".safetensors", ".bin", ".json", ".onnx") and path.exists():
        raise UserError(f"{name} is one file of a model; give the folder that it is in.")
    if path.exists():
        raise UserError(f"{name} is a file, where a folder was expected; hf-plm export {name} --out FOLDER makes one.")
    if not is_repository(name):
        raise UserError(f"There is no model {name}: neither a folder nor a repository such as user/model.")
    folder = download(name, "model", FILES)
    if not any(folder.glob("model*.safetensors")):
        folder = download(name, "model", FILES + PICKLED)
    return folder


def revision(folder: Path) -> str:
    """The commit of what came from the Hub; of another folder `sha256:` and a checksum of all that makes the model."""
    if folder.parent.name == "snapshots":
        return folder.name
    patterns = [*FILES, *PICKLED, "*.onnx", "*.onnx.data", ENCODER_FILE]
    total = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def cache_folder() -> Path:
    """Where exported encoders are kept: HF_PLM_CACHE, or `~/.cache/hf_plm`."""
    return Path(os.environ.get("HF_PLM_CACHE") or "~/.cache/hf_plm").expanduser()
