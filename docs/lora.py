"""Fine-tunes a Hub folder on labelled proteins with LoRA. It needs transformers and peft, and nothing of hf_plm.

    python docs/lora.py runs/mine/hub table.tsv

The table is tab separated. Its header names a column `sequence` and either a column `label`, one for each protein, or a
column `labels`, one character for each residue, "-" where it is not known. A column `split`, if there is one, begins
with `train` in the rows to learn from, and all others are held out. Without it a fifth is held out at random: relatives
are then on both sides, and new families will come out worse than what is printed here. A GPU is used if there is one;
a thousand proteins of ordinary length take minutes without.
"""

import argparse
import csv
import gzip
import random
import re
from collections import Counter

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, EsmForSequenceClassification, EsmForTokenClassification
from transformers.utils import logging

MAX_RESIDUES = 1022  # longer proteins are cut here, as in ESM-2's own training
UNKNOWN = -100  # a label that is passed over
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Every weight of the base is frozen. Beside each query, key and value matrix comes a product of two thin ones, which
# starts at zero; these and the classifier are trained. Ranks from 4 do as well (Sledzieski et al. 2024, PNAS 121).
logging.set_verbosity_error()  # of the classifier, which is new and said to be
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value"], modules_to_save=["classifier"])


def read_table(path):
    """(sequence, label) of the rows to learn from and of those held out, in random order."""
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    random.Random(0).shuffle(rows)
    parts = {True: [], False: []}
    for place, row in enumerate(rows):
        is_train = row["split"].startswith("train") if "split" in row else place % 5 > 0
        # One letter stays one letter, or every label after it would be at the wrong residue.
        sequence = re.sub("[^LAGVSERTIDPKQNFYMHWCXBUZO]", "X", row["sequence"].upper())
        if "labels" in row and len(sequence) != len(row["labels"]):
            raise SystemExit(f"{path}: {len(row['labels'])} labels for the {len(sequence)} residues of {sequence}")
        parts[is_train].append((sequence, list(row["labels"]) if "labels" in row else row["label"]))
    if not (parts[True] and parts[False]):
        raise SystemExit(f"{path}: {len(parts[True])} rows to learn from and {len(parts[False])} held out")
    return parts[True], parts[False]


def known(rows):
    """Every label of the rows that is known, in a list."""
    return [name for _, label in rows for name in ([label] if isinstance(label, str) else label) if name != "-"]


def batches(rows, tokenizer, ids):
    """Eight proteins at a time, padded, with the numbers of their labels."""
    for start in range(0, len(rows), 8):
        sequences, labels = zip(*rows[start : start + 8], strict=True)
        batch = tokenizer([sequence[:MAX_RESIDUES] for sequence in sequences], padding=True, return_tensors="pt")
        if isinstance(labels[0], str):
            batch["labels"] = torch.tensor([ids.get(label, UNKNOWN) for label in labels])
        else:  # <cls> comes first, <eos> and padding last: these have no label
            batch["labels"] = torch.full_like(batch["input_ids"], UNKNOWN)
            for row, letters in zip(batch["labels"], labels, strict=True):
                numbers = [ids.get(letter, UNKNOWN) for letter in letters[:MAX_RESIDUES]]
                row[1 : 1 + len(numbers)] = torch.tensor(numbers)
        yield batch.to(DEVICE)


def predict(model, batch):
    """Loss summed over the labels, how many were predicted right, and how many there are."""
    labels = batch.pop("labels").flatten()
    logits = model(**batch).logits.flatten(0, -2)
    loss = cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="sum")
    return torch.stack([loss, (logits.argmax(-1) == labels).sum(), (labels != UNKNOWN).sum()])


@torch.no_grad()
def evaluate(model, data):
    loss, correct, count = sum(predict(model.eval(), batch) for batch in data).tolist()
    return f"loss {loss / count:.4f}, accuracy {correct / count:.4f} on {count:.0f} labels"


def main(hub_folder, table, epochs, adapter):
    """Trains, writes the adapter and returns the model, printing what is held out before, between and after."""
    train, held_out = read_table(table)
    names = sorted(set(known(train)))
    ids = {name: number for number, name in enumerate(names)}
    tokenizer = AutoTokenizer.from_pretrained(hub_folder)
    print(f"{len(train)} proteins to learn from, {len(held_out)} held out; labels: {', '.join(names)}")
    (most_frequent, count), *_ = Counter(known(held_out)).most_common(1)
    print(f"Held out, always {most_frequent}: accuracy {count / len(known(held_out)):.4f}")

    torch.manual_seed(0)
    kind = EsmForSequenceClassification if isinstance(train[0][1], str) else EsmForTokenClassification
    base = kind.from_pretrained(hub_folder, id2label=dict(enumerate(names)), label2id=ids)
    model = get_peft_model(base, LORA).to(DEVICE)
    model.print_trainable_parameters()
    print("Held out, before:", evaluate(model, batches(held_out, tokenizer, ids)))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for epoch in range(1, epochs + 1):
        random.Random(epoch).shuffle(train)
        for batch in batches(train, tokenizer, ids):
            loss, _, count = predict(model.train(), batch)
            (loss / count.clamp(min=1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"Held out, after epoch {epoch}:", evaluate(model, batches(held_out, tokenizer, ids)))

    # The adapter is small, and the base stays where it is. The configuration beside it keeps the names of the labels.
    model.save_pretrained(adapter)
    base.config.save_pretrained(adapter)
    again = kind.from_pretrained(hub_folder, config=AutoConfig.from_pretrained(adapter))
    again = PeftModel.from_pretrained(again, adapter).to(DEVICE)
    print(f"Held out, read back from {adapter}:", evaluate(again, batches(held_out, tokenizer, ids)))
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("hub_folder")
    parser.add_argument("table")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--adapter", default="adapter", help="the folder to write")
    main(**vars(parser.parse_args()))
