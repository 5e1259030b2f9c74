"""hf_plm: from a FASTA file to a protein language model on the Hugging Face Hub.

The names below are imported when they are first used, so that `hf-plm --help` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

from hf_plm.version import __version__

if TYPE_CHECKING:
    from hf_plm.config import Recipe, UserError
    from hf_plm.inference.embedder import Embedder, embed
    from hf_plm.models.presets import build_model, esm_config
    from hf_plm.proteins.tokenizer import ProteinTokenizer
    from hf_plm.recipe import load_recipe
    from hf_plm.training.pretrain import Result, pretrain

_HOMES = {
    "Embedder": "hf_plm.inference.embedder",
    "ProteinTokenizer": "hf_plm.proteins.tokenizer",
    "Recipe": "hf_plm.config",
    "Result": "hf_plm.training.pretrain",
    "UserError": "hf_plm.config",
    "build_model": "hf_plm.models.presets",
    "embed": "hf_plm.inference.embedder",
    "esm_config": "hf_plm.models.presets",
    "load_recipe": "hf_plm.recipe",
    "pretrain": "hf_plm.training.pretrain",
}

__all__ = [
    "Embedder",
    "ProteinTokenizer",
    "Recipe",
    "Result",
    "UserError",
    "__version__",
    "build_model",
    "embed",
    "esm_config",
    "load_recipe",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_plm' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
