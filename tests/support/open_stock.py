"""Uses a Hub folder as a stranger would, with transformers alone, and prints what came out as JSON.

    python -I tests/support/open_stock.py FOLDER

Runs under any interpreter that has torch and transformers 4.57 or newer; hf_plm is made unimportable first. Numbers may
be compared between versions: heads that the folder does not hold are filled from one generator, not left as drawn.
"""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

sys.modules["hf_plm"] = None  # type: ignore[assignment]  # `import hf_plm` now raises, installed or not
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402

SEQUENCES = ["MKTVRQERLKSIVRILERSKEPVSGAQLAEELS", "MK<mask>VX", "A", "MBUZOC"]
LABELLED = ["MKTVRQERLKSIVRILERSKEPVSGAQLAEELS", "MKVLAARQ"]  # padded, hence no <mask>: see `alone` below
NUM_LABELS = 3
LEARNING_RATE = 1e-3


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def heard(messages: dict[str, list[str]], step: str, folder: str) -> Iterator[None]:
    """Keeps what transformers says (log and warnings) under `messages[step]`: sorted lines without the folder's name.

    Sorted, because transformers 5 lists the keys of a load report in another order each time.
    """
    handler = _Messages()
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    logging.getLogger("transformers").removeHandler(handler)
    texts = handler.texts + [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    plain = re.sub(r"\x1b\[\d*m", "", "\n".join(texts)).replace(folder, "FOLDER")
    messages[step] = sorted(" ".join(line.split()) for line in plain.splitlines() if line.strip())


def keys(info: dict) -> dict[str, list[str]]:
    return {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}


def one_step(folder: str, name: str) -> dict:
    """Loads the folder under a new head and takes one step of gradient descent with every weight."""
    model, info = getattr(transformers, name).from_pretrained(folder, num_labels=NUM_LABELS, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.classifier.named_parameters()):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = tokenizer(LABELLED, padding=True, return_tensors="pt")
    if name == "EsmForTokenClassification":
        batch["labels"] = torch.where(batch["input_ids"] > 3, batch["input_ids"] % NUM_LABELS, -100)
    else:
        batch["labels"] = torch.arange(len(LABELLED))
    before = model.train()(**batch)
    before.loss.backward()
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    with torch.no_grad():
        after = model(**batch)
    # What comes out at padding means nothing, and differs between versions.
    logits = before.logits[batch["attention_mask"].bool()] if before.logits.ndim == 3 else before.logits
    losses = [before.loss.item(), after.loss.item()]
    return {**keys(info), "num_labels": model.config.num_labels, "logits": logits.tolist(), "losses": losses}


def predict_contacts(folder: str) -> list:
    """Contact probabilities of the first sequence. Eager attention, since no other gives the weights they are made of:
    `predict_contacts` of a model loaded without it raises, in every version and for the published folders too."""
    model = transformers.EsmForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    batch = transformers.AutoTokenizer.from_pretrained(folder)(SEQUENCES[:1], return_tensors="pt")
    with torch.no_grad():
        return model.predict_contacts(batch["input_ids"], batch["attention_mask"])[0].tolist()


def open_stock(folder: str) -> dict:
    """Versions, loading info, ids, logits, contacts, fill-mask, fine-tuning of the folder, in plain JSON values."""
    messages: dict[str, list[str]] = {}
    with heard(messages, "AutoModelForMaskedLM", folder):
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    with heard(messages, "AutoTokenizer", folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with heard(messages, "AutoModel", folder):
        base, base_info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        # One by one: 4.57 counts padding into the token-dropout share, so its padded rows with a <mask> are off.
        alone = [model(**tokenizer(sequence, return_tensors="pt")).logits[0] for sequence in SEQUENCES]
        hidden = base(**tokenizer(SEQUENCES[0], return_tensors="pt")).last_hidden_state[0]
    with heard(messages, "fill-mask", folder):
        answers = transformers.pipeline("fill-mask", model=folder)([SEQUENCES[1], "<mask>" + SEQUENCES[0][1:]])
    with heard(messages, "predict_contacts", folder):
        contacts = predict_contacts(folder)
    steps = {}
    for name in ("EsmForSequenceClassification", "EsmForTokenClassification"):
        with heard(messages, name, folder):
            steps[name] = one_step(folder, name)
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model_class": type(model).__name__,
        "tokenizer_class": type(tokenizer).__name__,
        **keys(info),
        "num_weights": sum(parameter.numel() for parameter in model.parameters()),
        "sequences": SEQUENCES,
        "ids": [tokenizer(sequence)["input_ids"] for sequence in SEQUENCES],
        "padded_ids": tokenizer(SEQUENCES, padding=True)["input_ids"],
        "decoded": tokenizer.decode(tokenizer(SEQUENCES[1])["input_ids"]),
        "max_length": tokenizer.model_max_length,
        "logits": [part.tolist() for part in alone],
        "logits_sum": torch.cat(alone).double().sum().item(),
        "logits_masked": alone[1][3].tolist(),
        "base": {"class": type(base).__name__, **keys(base_info), "hidden": hidden.tolist()},
        "fill_mask": answers,
        "contacts": contacts,
        "steps": steps,
        "messages": messages,
    }


if __name__ == "__main__":
    print(json.dumps(open_stock(sys.argv[1])))
