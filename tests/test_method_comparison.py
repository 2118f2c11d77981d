"""PEFT's method comparison with our methods: what PEFT reads, what we drive from outside, and the small table."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny import DECODER, decoder_folder
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lor2c.disk.files import read_jsonl

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import method_comparison

# The suite's two files in miniature, with the calls that the launcher relies on.
UTILS = """
import torch

RESULT_PATH = RESULT_PATH_TEST = RESULT_PATH_CANCELLED = ""


def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, lr_scheduler_arg, **optimizer_kwargs):
    optimizer = getattr(torch.optim, optimizer_type)(model.parameters(), **optimizer_kwargs)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=max_steps)
"""
RUN = """
import json
import sys
from pathlib import Path

import torch
import utils
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from utils import get_optimizer_and_scheduler

path = sys.argv[-1]
params = json.loads(Path(path, "training_params.json").read_text())
base = LlamaForCausalLM(LlamaConfig(**json.loads(Path("llama.json").read_text())))
model = get_peft_model(base, PeftConfig.from_pretrained(path))
optimizer, scheduler = get_optimizer_and_scheduler(
    model, optimizer_type="AdamW", max_steps=12, lr_scheduler_arg=None, **params["optimizer_kwargs"]
)
ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
for _ in range(12):
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    scheduler.step()
name = "--".join(Path(path).parts[1:])
made = {"spans": model.base_model.layout().spans, "injected": len(model.base_model.layout().injected)}
Path(utils.RESULT_PATH, f"{name}.json").write_text(json.dumps(made))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    method_comparison.write(folder)
    return folder


def test_peft_reads_what_is_written(written):
    """Each experiment is a folder of the suite's form, whose configuration PEFT reads as ours."""
    made = method_comparison.experiments()
    assert {p.parent.relative_to(written / "experiments").as_posix() for p in written.rglob("adapter_config.json")} == set(made)
    for name, (config, rate, moves) in made.items():
        place = written / "experiments" / name
        read = PeftConfig.from_pretrained(place)
        assert type(read) is type(config) and read.to_dict() == config.to_dict()
        params = place / "training_params.json"
        assert (json.loads(params.read_text())["optimizer_kwargs"]["lr"] if params.exists() else None) == rate
        assert (place / "moves.json").exists() == bool(moves) == name.startswith("imlor2c/")


def test_rank_53_is_as_large_as_the_suites_lora():
    """On Llama-3.2-3B's shape, within a hundredth."""
    shape = dict(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
        intermediate_size=64, vocab_size=64,
    )  # fmt: skip
    configs = method_comparison.experiments()["lor2c/llama-3.2-3B-rank53"][0], LoraConfig(r=32, task_type="CAUSAL_LM")
    with torch.device("meta"):
        models = [get_peft_model(LlamaForCausalLM(LlamaConfig(**shape)), config) for config in configs]
    ours, loras = (model.get_nb_trainable_parameters()[0] for model in models)
    assert loras == 9_175_040 and abs(ours / loras - 1) < 0.01


def test_an_experiment_is_started_beside_a_checkout(written, tmp_path, monkeypatch, capfd):
    """The checkout's run.py runs as it is, IMLoR2C moves in it, and all that is written lies beside the experiments."""
    suite = tmp_path / "peft" / method_comparison.SUITE
    suite.mkdir(parents=True)
    (suite / "utils.py").write_text(UTILS)
    (suite / "run.py").write_text(RUN)
    before = sorted(p.name for p in suite.iterdir())
    folder, name = tmp_path / "runs", "imlor2c/llama-3.2-3B-rank32-stream"
    place = folder / "experiments" / name
    place.mkdir(parents=True)
    for file in (written / "experiments" / name).iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (place / "moves.json").write_text(json.dumps(dict(max_merges=1, max_injections=1, schedule="fractional")))
    (folder / "llama.json").write_text(json.dumps(DECODER | {"num_hidden_layers": 6, "hidden_size": 32}))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert method_comparison.start(tmp_path / "peft", folder) == 0
    [result] = (folder / "results").glob("*.json")
    made = json.loads(result.read_text())
    history = json.loads((folder / "results" / "imlor2c--llama-3.2-3B-rank32-stream.moves").read_text())
    assert sorted(e["move"]["kind"] for e in history if e["move"]) == ["inject", "merge"]
    assert len(made["spans"]) == 4 and made["injected"] == 1
    assert sorted(p.name for p in suite.iterdir()) == before
    # A finished experiment isn't started again, and one that ends without a result is told.
    capfd.readouterr()
    assert method_comparison.start(tmp_path / "peft", folder) == 0 and capfd.readouterr().out == ""
    result.unlink()
    monkeypatch.setattr(method_comparison.subprocess, "run", lambda *_, **__: None)
    assert method_comparison.start(tmp_path / "peft", folder) == 1 and "no result" in capfd.readouterr().out


def test_the_small_table(tmp_path):
    """A record with all the suite's measures, from a fresh process."""
    asked = {"Body": "Ann had 3", "Question": "One more?"}
    rows = [asked | {"Equation": f"( {n}.0 + 1.0 )", "Answer": f"{n + 1}.0"} for n in range(8)]
    (tmp_path / "svamp").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"svamp/{split}.parquet")
    pq.write_table(pa.table({"context": ["A sentence.", "Another one.", "Another one."]}), tmp_path / "texts.parquet")
    model, output = decoder_folder(tmp_path / "model"), tmp_path / "out.jsonl"
    small = ["--steps", "2", "--held-out", "2", "--number", "2", "--length", "400", "--precision", "fp32", "--device", "cpu"]
    words = ["reduced", model, tmp_path, "--texts", tmp_path / "texts.parquet", "--output", output, *small]
    contender = "lor2c:rank=2:units=stream:lr=0.1"
    method_comparison.reduced(method_comparison.parser().parse_args([*map(str, words), "--contenders", contender]))
    [record] = read_jsonl(output)
    assert record["name"] == contender and record["steps"] == 2 and record["rows"]["validation"] == 2
    assert 0 <= record["accuracy"] <= 1 and record["hyper_parameters"]["data_dir"] is None
    assert record["peak_bytes"] > 2**20 and record["file_bytes"] > 4 * record["adapter_parameters"]
    assert 0 < record["train_seconds"] < record["total_seconds"] and record["forgetting"] != 0
    base, tokenizer = LlamaForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    # One long and one short text count by their tokens.
    tokens, sums = 0, 0.0
    for text in ("A sentence.", "Another one."):
        ids = tokenizer(text, return_tensors="pt").input_ids
        sums += cross_entropy(base(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    assert record["loss_before"] == pytest.approx(sums / tokens, rel=1e-4)


def test_the_texts_come_from_all_over_a_file(tmp_path):
    pq.write_table(pa.table({"context": [str(n // 2) for n in range(20)]}), tmp_path / "texts.parquet")
    assert method_comparison.read_texts(str(tmp_path / "texts.parquet"), "context", 3) == ["0", "3", "6"]
