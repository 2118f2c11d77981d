"""Reads exported folders where neither lor2c nor PEFT is imported: python exported.py FOLDER, with asked.pt in it.

asked.pt maps the name of a folder to its Auto class, batch and generation settings. read.pt gets its logits, tokens and keys.
"""

import sys
from pathlib import Path

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


def load(folder: Path, auto: str):
    options = dict(trust_remote_code=True, output_loading_info=True)
    model, info = getattr(transformers, auto).from_pretrained(folder, **options)
    return model.eval(), sorted(
        key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]
    )


@torch.no_grad()
def read(folder: Path, auto: str, batch: dict, generations: list[dict], again: bool, compiled: bool) -> dict:
    model, keys = load(folder, auto)
    found = dict(keys=keys, logits=model(**batch).logits, name=type(model).__name__)
    inputs = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask")}
    found["tokens"] = [model.generate(**inputs, **how) for how in generations]
    if again:  # saved once more
        model.save_pretrained(folder.with_name(f"{folder.name}_again"))
        found["again"] = load(folder.with_name(f"{folder.name}_again"), auto)[0](**batch).logits
    if compiled:
        found["compiled"] = torch.compile(model, backend="eager", fullgraph=True)(**batch).logits
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    asked = torch.load(place / "asked.pt", weights_only=False)
    results = {name: read(place / name, **how) for name, how in asked.items()}
    assert not {"lor2c", "peft"} & set(sys.modules)
    torch.save(results, place / "read.pt")
