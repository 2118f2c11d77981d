"""Every method of the command line trains, is saved, and comes back as what was scored."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import ENCODER
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lor2c.data.base import demo_model, load_classifier
from lor2c.data.classification import compute_metrics
from lor2c.data.demo import load_demo
from lor2c.data.tasks import find_task
from lor2c.runs.build import load_data
from lor2c.runs.job import prepare
from lor2c.runs.methods import METHODS
from lor2c.runs.recipes import make_run
from lor2c.runs.train import make_trainer, train

# A shadow network is for decoders: tests/runs/test_instructions.py trains one.
CASES = [(method, {}) for method in METHODS if method != "shadow"] + [("lor2c", {"rm": True}), ("imlor2c", {"rm": True})]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A random BERT of six narrow layers, large enough weights for adapters to matter, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = T.BertConfig(**{**ENCODER, "vocab_size": 30_522, "num_hidden_layers": 6, "initializer_range": 0.5})
    T.BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(folder)
    return str(folder)


def run_of(method: str, base: str, data: Path, **changes):
    limits = {name: 1 for name in ("max_merges", "max_injections") if method in ("imlor2c",)}
    settings = dict(epochs=3, batch_size=16, max_length=16, lr=3e-2, seed=3, device="cpu", data_dir=str(data))
    return make_run("sst2", method, base, **(settings | limits | changes))


@pytest.mark.parametrize("method, changes", CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_comes_back_as_scored(method, changes, base, glue_data, tmp_path):
    if method in ("mergelor2c", "injectlor2c"):
        changes = {"max_merges" if method == "mergelor2c" else "max_injections": 1}
    changes = {"threshold": 0.03} if method == "sora" else changes  # gates of both kinds after two dozen steps
    run = run_of(method, base, glue_data, **changes)
    record = train(run, tmp_path / "run")
    assert 0 < record.get("inference_parameters", 1) < record["trainable_parameters"]
    assert ("inference_parameters" in record) == (method == "sora")
    assert record == json.loads((tmp_path / "run/record.json").read_text()) and len(record["history"]) == 3
    how = dict(num_labels=2, dtype=torch.float32)
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model", **how)
    else:
        fresh = AutoModelForSequenceClassification.from_pretrained(base, **how)
        model = PeftModel.from_pretrained(fresh, tmp_path / "run/adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_data(run, tokenizer)[0]["validation"]
    batch = tokenizer.pad(rows.select_columns(["input_ids", "attention_mask"]).to_dict(), return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        if method not in ("head", "full"):  # what was loaded matters
            for name, p in model.named_parameters():
                if any(part in name for part in ("lora_", "lor2c_", "hada_", "lokr_", "miss_", "ia3_", "edit_", "shadow_")):
                    p.zero_()
            assert (model(**batch).logits - logits).abs().max() > 1e-2
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(rows["labels"])).item()
    best = record["metrics"]["best"]
    assert compute_metrics(find_task(run.task), logits.numpy(), rows["labels"])["accuracy"] == best["accuracy"]
    if method != "adalora":  # PEFT adds its regulariser to the loss
        assert loss == pytest.approx(best["loss"], abs=1e-5)


def test_rm_writes_down_what_the_paper_measures(base, glue_data, tmp_path):
    """An entry at the start and after each epoch, of every pair; the pairs of a structure that changes come and go."""
    record = train(run_of("imlor2c", base, glue_data, rm=True, rm_coefficient=1e-2), tmp_path)
    assert [entry["epoch"] for entry in record["pairs"]] == [0, 1, 2, 3]
    assert [len(entry["pairs"]) for entry in (record["pairs"][0], record["pairs"][-1])] == [6, 6 - 1 - 1 + 2]
    first = next(iter(record["pairs"][0]["pairs"].values()))
    assert first["rank"] == 0 and first["orthogonality"] == ENCODER["hidden_size"]  # dW = 0: ||-I||^2 = d


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_micro_batches_change_nothing(task, base, tmp_path):
    """A mean over rows is the mean of its parts' means, for labels and for scores; with the regulariser of RM-LoRA."""
    folder, found = tmp_path / task, {}
    folder.mkdir()
    rows = load_demo()["train"].select(range(32))
    texts = {"sentence": rows["text"]} if task == "sst2" else {"sentence1": rows["text"], "sentence2": rows["text"]}
    labels = rows["label"] if task == "sst2" else [float(i % 6) for i in range(32)]
    for split in ("train", "validation"):
        Dataset.from_dict({**texts, "label": labels}).to_parquet(folder / f"{split}.parquet")
    for micro in (16, 4):
        run = replace(
            run_of("rmlora", base, tmp_path, micro_batch_size=micro, dropout=0.0, epochs=1, lr=1e-3), task=task
        )
        record = train(run, tmp_path / f"{micro}")
        found[micro] = load_file(tmp_path / f"{micro}/adapter/adapter_model.safetensors"), record["history"][0]
    for name, tensor in found[16][0].items():
        torch.testing.assert_close(found[4][0][name], tensor, rtol=1e-4, atol=1e-5)
    assert found[4][1]["train_loss"] == pytest.approx(found[16][1]["train_loss"], rel=1e-4)


def test_an_earlier_task_leaves_no_loss_behind(base, tmp_path):
    """A checkpoint of transformers remembers which loss it was trained with."""
    kinds = {("no", "yes"): "single_label_classification", (): "regression"}
    for labels, kind in kinds.items():
        model, tokenizer, _ = load_classifier(base, labels)
        assert model.config.problem_type == kind
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    for (labels, kind), other in zip(kinds.items(), reversed(kinds.values()), strict=True):
        assert load_classifier(str(tmp_path / other), labels)[0].config.problem_type == kind


def test_adalora_ends_at_its_final_rank(base, glue_data, tmp_path):
    """Of twelve singular values that each of twelve projections begins with, eight are left on average."""
    job = prepare(run_of("adalora", base, glue_data), tmp_path)
    job.args.load_best_model_at_end = False
    trainer = make_trainer(job)
    trainer.train()
    values = [p for name, p in trainer.model.named_parameters() if "lora_E" in name]
    assert [p.numel() for p in values] == 12 * [12] and sum(int((p != 0).sum()) for p in values) == 12 * 8


def test_adalora_begins_again(base, glue_data, tmp_path, capsys):
    """No checkpoint holds the importance of its values, so an interrupted run starts from the beginning."""
    run = run_of("adalora", base, glue_data)
    first = train(run, tmp_path / "a")
    (tmp_path / "b/checkpoints/checkpoint-1").mkdir(parents=True)
    (tmp_path / "b/run.json").write_text((tmp_path / "a/run.json").read_text())
    capsys.readouterr()
    again = train(run, tmp_path / "b", resume=True)
    assert "adalora cannot go on: from the start" in capsys.readouterr().out and again["history"] == first["history"]
