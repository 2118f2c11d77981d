"""A copy of a decoder that knows only the tokens of a data set, so that a CPU spends its time in the layers.

Gemma 3 270M has 262,144 tokens, and on short rows most of a step goes into its last product. The texts that you name are
tokenized as before. Losses are over fewer tokens, so they compare with each other and not with those of the whole model.

    python benchmarks/prune.py gemma-270m FOLDER DATA.parquet ...
"""

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from lor2c.data.base import load_decoder
from lor2c.data.prompts import make_prompt


def used(tokenizer: PreTrainedTokenizerFast, files: list[str], rows: int) -> set[int]:
    "The tokens of the first rows of these files, alone and in the prompts that lor2c makes of them."
    ids = set(tokenizer.all_special_ids)
    for row in (row for file in files for row in pq.read_table(file).slice(0, rows).to_pylist()):
        texts = [str(text or "") for text in row.values()]
        asked, answer = row.get("instruction", row.get("question", "")), row.get("output", row.get("answer", ""))
        texts.append(make_prompt(tokenizer, asked, row.get("input") or "", "alpaca", answer))
        ids.update(i for text in texts for i in tokenizer(text).input_ids)
    return ids


def closed(words: set[str], merges: list[list[str]]) -> set[str]:
    "These words with all parts that byte-pair encoding may make them of."
    made_of: dict[str, list[list[str]]] = {}
    for merge in merges:
        made_of.setdefault("".join(merge), []).append(merge)
    todo, kept = list(words), set(words)
    while todo:
        for part in {part for merge in made_of.get(todo.pop(), []) for part in merge} - kept:
            kept.add(part)
            todo.append(part)
    return kept


def pruned(tokenizer: PreTrainedTokenizerFast, ids: set[int]) -> tuple[Tokenizer, list[int]]:
    "A tokenizer with these tokens and their parts, and the old numbers of its tokens."
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    old = tokenizer.get_vocab()
    words = {tokenizer.convert_ids_to_tokens(i) for i in ids} | {word for word in old if word.startswith("<0x")}
    words = closed(words & old.keys(), model["merges"])
    keep = sorted(old[word] for word in words)
    new = {tokenizer.convert_ids_to_tokens(i): n for n, i in enumerate(keep)}
    model["vocab"] = {word: n for word, n in new.items() if word in model["vocab"]}
    model["merges"] = [m for m in model["merges"] if m[0] in new and m[1] in new and "".join(m) in new]
    content["added_tokens"] = [t | {"id": new[t["content"]]} for t in content["added_tokens"] if t["content"] in new]
    content["post_processor"] = None if content["post_processor"] is None else renumbered(content["post_processor"], new)
    return Tokenizer.from_str(json.dumps(content)), keep


def renumbered(processor: dict, new: dict[str, int]) -> dict:
    "A post-processor that knows its special tokens by their new numbers."
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [new[word] for word in token["tokens"]]
    return processor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="on the hub, a folder, or gemma-270m")
    parser.add_argument("folder", type=Path, help="for the copy")
    parser.add_argument("data", nargs="+", help="Parquet files")
    parser.add_argument("--rows", type=int, default=5000, help="of each file (%(default)s)")
    args = parser.parse_args()
    model, tokenizer = load_decoder(args.model, "fp32", None, "cpu")
    small, keep = pruned(tokenizer, used(tokenizer, args.data, args.rows))
    names = {name: tokenizer.special_tokens_map[name] for name in tokenizer.special_tokens_map if name.endswith("_token")}
    copy = PreTrainedTokenizerFast(tokenizer_object=small, padding_side=tokenizer.padding_side, **names)
    rows = torch.tensor(keep)
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(table.weight.detach()[rows].clone())
    table.num_embeddings, table.padding_idx, model.config.vocab_size = len(keep), None, len(keep)
    model.tie_weights()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(copy, name))
    model.generation_config.update(bos_token_id=copy.bos_token_id, eos_token_id=copy.eos_token_id, pad_token_id=copy.pad_token_id)
    model.save_pretrained(args.folder)
    copy.save_pretrained(args.folder)
    print(f"{len(keep):,} of {len(tokenizer):,} tokens, {sum(p.numel() for p in model.parameters()):,} numbers: {args.folder}")
