"""Opens a Hub folder as a stranger would, with transformers alone, and prints what it found as JSON.

    python -I tests/support/open_stock.py FOLDER

Runs under any interpreter that has torch and transformers 4.57 or newer; hf_plm is made unimportable first.
"""

import json
import os
import sys
import warnings

sys.modules["hf_plm"] = None  # type: ignore[assignment]  # `import hf_plm` now raises, installed or not
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402

SEQUENCES = ["MKTVRQERLKSIVRILERSKEPVSGAQLAEELS", "MK<mask>VX", "A", "MBUZOC"]


def open_stock(folder: str) -> dict:
    """Versions, loading info, ids, padding, logits and fill-mask of the folder, in plain JSON values."""
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SEQUENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        # One by one: 4.57 counts padding into the token-dropout share, so its padded rows with a <mask> are off.
        alone = [model(**tokenizer(sequence, return_tensors="pt")).logits[0] for sequence in SEQUENCES]
    logits = torch.cat(alone)
    fill_mask = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model_class": type(model).__name__,
        "tokenizer_class": type(tokenizer).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "num_weights": sum(parameter.numel() for parameter in model.parameters()),
        "sequences": SEQUENCES,
        "ids": [tokenizer(sequence)["input_ids"] for sequence in SEQUENCES],
        "padded_ids": batch["input_ids"].tolist(),
        "logits_sum": logits.double().sum().item(),
        "logits_abs_sum": logits.double().abs().sum().item(),
        "logits_masked": alone[1][3].tolist(),
        "fill_mask": [(answer["token_str"], answer["score"]) for answer in fill_mask(SEQUENCES[1])],
    }


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        report = open_stock(sys.argv[1])
    print(json.dumps(report))
