"""A transformers tokenizer for protein sequences that needs no file.

It is for people and for other libraries: it pads, decodes and returns tensors as any tokenizer does, at well under a
million residues a second. The loader encodes with `vocabulary.encode`, a hundred times faster; the ids are the same.
What it saves names `EsmTokenizer`, which transformers ships, so that others open it without this package.
"""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizer

from hf_plm.config import UserError
from hf_plm.proteins.vocabulary import CLS_ID, EOS_ID, TOKEN_TO_ID, TOKENS, UNK_ID, VOCABULARY_SIZE

VOCABULARY_FILE = "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"

# `<null_1>` is the one token of several characters that transformers does not split off as a special token itself.
_TOKEN = re.compile(r"<null_1>|\S")


class ProteinTokenizer(PreTrainedTokenizer):
    """One residue is one token: `ProteinTokenizer()("MKTV")["input_ids"]` is `<cls>` M K T V `<eos>`.

    On cleaned sequences the ids are those of `EsmTokenizer` and of fair-esm's `Alphabet.from_architecture("ESM-1b")`.
    White space between residues is ignored. A character outside the vocabulary is one `<unk>`; `EsmTokenizer` makes
    one of a whole run, and every position after it is wrong. Decoding puts no spaces between residues.

    `model_max_length` is left at "none": rotary positions have no last position, and a number here (1,024, say) would
    make `truncation=True` cut longer proteins without a word. Cropping is the loader's business.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    # transformers hands everything that it finds in tokenizer_config.json to the constructor, hence the open end.
    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        """`from_pretrained` gives `vocab_file`; raises `UserError` if that holds another vocabulary than ESM-2's."""
        if vocab_file is not None:
            found = tuple(Path(vocab_file).read_text(encoding="utf-8").split())
            if found != TOKENS:
                raise UserError(
                    f"{vocab_file} holds {len(found)} tokens, which are not the {VOCABULARY_SIZE} of ESM-2 in their "
                    "order; open that folder with transformers' AutoTokenizer instead."
                )
        names = {"unk_token": "<unk>", "cls_token": "<cls>", "pad_token": "<pad>", "mask_token": "<mask>"}
        super().__init__(**{**names, "eos_token": "<eos>", **kwargs})

    @property
    def vocab_size(self) -> int:
        return VOCABULARY_SIZE

    def get_vocab(self) -> dict[str, int]:
        return {**TOKEN_TO_ID, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return _TOKEN.findall(text)

    def _convert_token_to_id(self, token: str) -> int:
        return TOKEN_TO_ID.get(token, UNK_ID)

    def _convert_id_to_token(self, index: int) -> str:
        return TOKENS[index] if 0 <= index < VOCABULARY_SIZE else TOKENS[UNK_ID]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`<cls>` sequence `<eos>`; of a pair, `<cls>` first `<eos>` second `<eos>`, as `EsmTokenizer` does."""
        second = [] if token_ids_1 is None else [*token_ids_1, EOS_ID]
        return [CLS_ID, *token_ids_0, EOS_ID, *second]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 where a token is special, 0 where it is a residue; with specials in place already, by their ids."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(index in special) for index in token_ids_0]
        second = [] if token_ids_1 is None else [0] * len(token_ids_1) + [1]
        return [1, *[0] * len(token_ids_0), 1, *second]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        path = Path(save_directory) / ((filename_prefix + "-" if filename_prefix else "") + VOCABULARY_FILE)
        path.write_text("\n".join(TOKENS), encoding="utf-8")
        return (str(path),)

    def _save_pretrained(
        self,
        save_directory: str,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        # save_pretrained has just written our own class name, which AutoTokenizer does not know elsewhere. This method
        # is the last step before an upload, so what is pushed to the Hub is right too.
        path = Path(save_directory) / ((filename_prefix + "-" if filename_prefix else "") + CONFIG_FILE)
        config = json.loads(path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "EsmTokenizer"
        # How this object came to be in this process says nothing to whoever loads the file.
        for key in ("backend", "is_local", "local_files_only"):
            config.pop(key, None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return saved
