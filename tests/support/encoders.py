"""Small random encoders of each published kind, with tokenizers like theirs, and their authors' steps written out.

The vocabularies have the published ids. Of Ankh and Ankh3 that is known of the standard residues only.
"""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    EsmcConfig,
    EsmcModel,
    EsmcTokenizer,
    EsmForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from hf_plm.models.presets import esm_config
from hf_plm.proteins.tokenizer import ProteinTokenizer
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES

UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
SELENOPROTEIN = "MCAARLAAAAAAAQSVYAFSARPLAGGEPVSLGSLRGKVLLIENVASLUGTTVRDYTQMNELQRRLGPRGLVVLGFPCNQFGHQENAK"
RARE = "XXUUOOMKBBZZXOXUZB"

T5_SPECIAL = ["<pad>", "</s>", "<unk>"]
PROTT5_LETTERS = "ALGVSREDTIPKFQNYMHWCXBOUZ"
ANKH3_LETTERS = "LAGSVERTIDPKNFQYHMCWXBOUZ"
PROTBERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"]


def scored(pieces):
    return [(piece, -float(rank) / 10) for rank, piece in enumerate(pieces)]


def unigram(pieces, pre_tokenizer=None):
    """A tokenizer as transformers 4 opened Ankh's: nothing comes before a word."""
    backend = Tokenizer(Unigram(scored(pieces), unk_id=2))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens([piece for piece in pieces if piece[0] in "<["])
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=512
    )


def prott5():
    return T5Tokenizer(scored([*T5_SPECIAL, *("\u2581" + letter for letter in PROTT5_LETTERS)]))


def prostt5():
    tokenizer = prott5()
    tokenizer.add_tokens([*STANDARD_RESIDUES.lower(), "<fold2AA>", "<AA2fold>"])
    return tokenizer


def ankh_pieces(letters=PROTT5_LETTERS):
    return [*T5_SPECIAL, *letters, *(f"<extra_id_{index}>" for index in range(115))]


def ankh3_pieces(letters=ANKH3_LETTERS):
    return [*T5_SPECIAL, "[NLU]", "[S2S]", "<unused_0>", "<unused_1>", *letters]


def esm2():
    return ProteinTokenizer()


def protbert(tokens=PROTBERT_TOKENS):
    return BertTokenizer({token: index for index, token in enumerate(tokens)}, do_lower_case=False)


# The authors' steps: what they give the tokenizer, and which of the tokens they keep.


def as_esm_does(tokenizer, sequence):
    return tokenizer(sequence)["input_ids"], slice(1, -1)


def as_prott5_does(tokenizer, sequence):
    sequence = " ".join(list(re.sub(r"[UZOB]", "X", sequence)))
    return tokenizer(sequence, add_special_tokens=True)["input_ids"], slice(0, -1)


def as_prostt5_does(tokenizer, sequence):
    sequence = "<AA2fold>" + " " + " ".join(list(re.sub(r"[UZOB]", "X", sequence)))
    return tokenizer(sequence, add_special_tokens=True)["input_ids"], slice(1, -1)


def as_ankh_does(tokenizer, sequence):
    return tokenizer(list(sequence), add_special_tokens=True, is_split_into_words=True)["input_ids"], slice(0, -1)


def as_ankh3_does(tokenizer, sequence):
    tokens = tokenizer("[NLU]" + sequence, add_special_tokens=True, is_split_into_words=False)
    return tokens["input_ids"], slice(1, -1)


def as_protbert_does(tokenizer, sequence):
    sequence = re.sub(r"[UZOB]", "X", " ".join(sequence))
    return tokenizer(sequence, add_special_tokens=True)["input_ids"], slice(1, -1)


KINDS = {
    "ESM-2": ("esm", esm2, as_esm_does),
    "ESM C": ("esmc", EsmcTokenizer, as_esm_does),
    "ProtT5": ("t5", prott5, as_prott5_does),
    "ProstT5": ("t5", prostt5, as_prostt5_does),
    "Ankh": ("t5", lambda: unigram(ankh_pieces()), as_ankh_does),
    "Ankh3": ("t5", lambda: unigram(ankh3_pieces()), as_ankh3_does),
    "ProtBert": ("bert", protbert, as_protbert_does),
}


T5_KINDS = [kind for kind, (model_type, *_) in KINDS.items() if model_type == "t5"]


def t5_config(**values):
    defaults = {
        "vocab_size": 160,
        "d_model": 48,
        "d_kv": 16,
        "d_ff": 80,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 64,
        "decoder_start_token_id": 0,
    }
    return T5Config(**{**defaults, **values})


def random_model(kind):
    """A model as its authors publish it: masked language models with their heads, T5 with its decoder, or without."""
    torch.manual_seed(0)
    if kind == "ESM-2":
        model = EsmForMaskedLM(esm_config("3x48x4"))
    elif kind == "ESM C":
        model = EsmcModel(EsmcConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4))
    elif kind == "ProtBert":
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=30,
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=96,
                max_position_embeddings=400,
            )
        )
    elif kind == "ProtT5":  # not gated, ReLU, heads wider than the model; published as an encoder alone
        model = T5EncoderModel(t5_config(feed_forward_proj="relu", relative_attention_num_buckets=32, d_kv=32))
    else:
        model = T5ForConditionalGeneration(t5_config())
    with torch.no_grad():  # as initialised, all are so near to linear that much goes unseen
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "relative_attention_bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in name and "shared" not in name:
                parameter.mul_(1.2 if kind in T5_KINDS else 3)  # T5 begins with large ones
    return model.eval()


def save_encoder(kind, folder, pickled=False):
    """A folder as on the Hub."""
    model = random_model(kind)
    if pickled:
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), Path(folder) / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    KINDS[kind][1]().save_pretrained(folder)
    return folder


@torch.no_grad()
def authors_vectors(kind, folder, sequence, layer=-1):
    """(N, D): one protein, as the authors' own script embeds it; `layer` is one of transformers' hidden states."""
    tokenizer = KINDS[kind][1]()
    ids, kept = KINDS[kind][2](tokenizer, sequence)
    if KINDS[kind][0] == "t5":
        model = T5EncoderModel.from_pretrained(folder)
    else:
        model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    ids = torch.tensor([ids])
    hidden = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    return hidden[layer][0, kept].numpy()
