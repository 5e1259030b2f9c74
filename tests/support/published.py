"""Copies a Hub folder of ours into the layout of `facebook/esm2_*`, so that one can be compared with the other.

    python tests/support/published.py FOLDER TARGET

No published file is at hand where the tests run. What those folders have and ours do not: the weight
`esm.embeddings.position_embeddings.weight`, of which rotary positions make no use; `special_tokens_map.json`;
a `tokenizer_config.json` of two keys; a `config.json` as transformers 4.25 wrote it.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

# Written by later versions of transformers only; the published files have none of them.
NEWER_KEYS = ("add_cross_attention", "bos_token_id", "eos_token_id", "is_decoder", "rope_theta", "tie_word_embeddings")
SPECIAL_TOKENS = {f"{name}_token": f"<{name}>" for name in ("cls", "eos", "mask", "pad", "unk")}
TOKENIZER = {"model_max_length": 1000000000000000019884624838656, "tokenizer_class": "EsmTokenizer"}


def write_published_layout(folder: Path, target: Path) -> None:
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    positions = np.zeros((config["max_position_embeddings"], config["hidden_size"]), np.float32)
    weights["esm.embeddings.position_embeddings.weight"] = positions
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    older = {key: value for key, value in config.items() if key not in (*NEWER_KEYS, "dtype")}
    older |= {"torch_dtype": config["dtype"], "transformers_version": "4.25.0.dev0"}
    for name, content in (
        ("config.json", older),
        ("special_tokens_map.json", SPECIAL_TOKENS),
        ("tokenizer_config.json", TOKENIZER),
    ):
        (target / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copy(folder / "vocab.txt", target)


if __name__ == "__main__":
    write_published_layout(Path(sys.argv[1]), Path(sys.argv[2]))
