"""Pictures: scikit-learn's digits as PNG, a small vision transformer trained from scratch, adapters on it, and broken files."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as T
from conftest import refused
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from lor2c.data import images
from lor2c.data.images import load_pictures, open_picture
from lor2c.runs.recipes import make_run
from lor2c.runs.train import train


def png(pixels: np.ndarray) -> dict:
    """A picture as the hub's Parquet files keep it."""
    file = io.BytesIO()
    Image.fromarray((pixels * 15).astype(np.uint8)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def digits(folder: Path, chosen: range, rows: int = 400) -> Path:
    """Pictures of these digits, the first of them to train on and the rest to be scored on."""
    data = load_digits()
    made = [
        {"image": png(pixels), "label": int(digit) - chosen[0]}
        for pixels, digit in zip(data.images, data.target, strict=True)
        if digit in chosen
    ]
    (folder / "pictures").mkdir(exist_ok=True)
    for split, part in (("train", made[:rows]), ("validation", made[rows : rows + 200])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"pictures/{split}.parquet")
    return folder


def run_of(method: str, model: str, data: Path, **changes):
    settings = dict(epochs=4, batch_size=16, lr=2e-2, device="cpu", data_dir=str(data))
    settings |= {} if method in ("full", "head") else {"dropout": 0.0}
    return make_run("pictures", method, model, **{**settings, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[str, dict]:
    """A vision transformer of four layers, trained from random weights on the digits 0 to 4; and the record of that run."""
    place = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=2
    )
    T.ViTModel(T.ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(place / "random")
    processor = T.ViTImageProcessorPil(size={"height": 8, "width": 8})
    processor.save_pretrained(place / "random")
    run = run_of("full", str(place / "random"), digits(place, range(5)), lr=5e-3, epochs=12, batch_size=32)
    record = train(run, place / "run")
    processor.save_pretrained(place / "run/model")
    return str(place / "run/model"), record


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return digits(tmp_path_factory.mktemp("rows"), range(5, 10))


def test_from_scratch(base):
    metrics = base[1]["metrics"]
    assert metrics["baseline"]["accuracy"] < 0.3 and metrics["best"]["accuracy"] > 0.8


def test_the_best_epoch_of_all_weights_is_the_one_that_is_saved(monkeypatch, base, data, tmp_path):
    """transformers saves a ViT's weights under names that a Trainer does not find again. The first epoch counts as the best."""
    scores, measure = [], images._accuracy

    def falling(out):
        scores.append(measure(out)["accuracy"])
        return {"accuracy": 1 / len(scores)}

    monkeypatch.setattr(images, "_accuracy", falling)
    record = train(run_of("full", base[0], data, epochs=2, lr=2e-3, max_train_samples=160), tmp_path / "run")
    model = T.AutoModelForImageClassification.from_pretrained(tmp_path / "run/model").eval()
    assert record["metrics"]["best"]["epoch"] == 1 and scores[0] != scores[1]
    assert accuracy(model, base[0], data) == pytest.approx(scores[0])


def accuracy(model, processor: str, data: Path) -> float:
    rows = load_pictures("pictures", data)["validation"]
    pixels = T.AutoImageProcessor.from_pretrained(processor)(
        [open_picture(p) for p in rows["image"]], return_tensors="pt"
    )
    with torch.no_grad():
        found = model(pixel_values=pixels["pixel_values"]).logits.argmax(-1)
    return (found == torch.tensor(rows["label"])).float().mean().item()


@pytest.mark.parametrize("method", ["lora", "lor2c", "reslora-bs", "rmlora"])
def test_other_digits_with_an_adapter(method, base, data, tmp_path):
    """Better than the commonest label, and the record's score is that of the adapter on disk."""
    record = train(run_of(method, base[0], data), tmp_path / "run")
    best = record["metrics"]["best"]["accuracy"]
    assert best > record["metrics"]["baseline"]["accuracy"] + 0.15
    head = T.AutoModelForImageClassification.from_pretrained(base[0], num_labels=5, ignore_mismatched_sizes=True)
    tuned = PeftModel.from_pretrained(head, tmp_path / "run/adapter").eval()
    assert accuracy(tuned, base[0], data) == pytest.approx(best)


@pytest.mark.parametrize("method", ["lora", "rlora", "gmlora"])
def test_only_a_pair_on_the_last_layer(method, base, data, tmp_path):
    """RM-LoRA's Figures 1 and 2: nothing else is trained, and the head under the pair stays as it was drawn."""
    changes = {} if method == "lora" else {"rm_coefficient": 0.01} if method == "rlora" else {}
    record = train(
        run_of(method, base[0], data, targets="head", rank=4, epochs=2, lr=3e-2, **changes), tmp_path / "run"
    )
    assert record["trainable_parameters"] == record["adapter_parameters"] == 4 * (32 + 5)
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {name.rpartition("classifier.")[2] for name in tensors} == {"lora_A.weight", "lora_B.weight"}
    assert record["metrics"]["best"]["accuracy"] > record["metrics"]["baseline"]["accuracy"]
    if method != "lora":
        [pair] = dict(record["pairs"][-1]["pairs"]).values()
        assert pair["rank"] == 4


def test_a_pair_on_the_head_of_a_text_classifier(tmp_path):
    from lor2c.runs.build import build_model, count_parameters

    model, _ = build_model(make_run("demo", "lora", targets="head", rank=2))
    assert count_parameters(model)["trainable_parameters"] == sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )
    with pytest.raises(ValueError, match="has no new head"):
        from lor2c.runs.build import adapter_config

        adapter_config(make_run("alpaca", "lora", "gemma-270m", targets="head"), [])


def test_interrupted_and_resumed(cut_and_resumed, base, data, tmp_path):
    run = run_of("lor2c", base[0], data, epochs=2, max_train_samples=64)
    cut_and_resumed(run, tmp_path / "whole", train(run, tmp_path / "whole"))


@pytest.mark.parametrize(
    "row, said",
    [
        ({"image": {"bytes": b"no picture", "path": None}, "label": 0}, "row 1: the picture cannot be read"),
        ({"image": None, "label": 0}, "row 1: no value in column image"),
        ({"image": png(np.zeros((8, 8))), "label": -1}, "row 1: label -1 is no number from 0 on"),
        ({"image": png(np.zeros((8, 8))), "label": 7}, "has label 7, which no training row has"),
    ],
)
def test_a_bad_row_is_named(capsys, base, tmp_path, row, said):
    good = {"image": png(np.zeros((8, 8))), "label": 0}
    (tmp_path / "pictures").mkdir()
    for split, rows in (("train", [good, good]), ("validation", [good, row])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"pictures/{split}.parquet")
    out = ("--model", base[0], "--data-dir", tmp_path, "--output-dir", tmp_path / "run")
    assert f"pictures/validation {said}" in refused(capsys, "images", "--task", "pictures", *out)
    assert "reads texts" in refused(capsys, "images", "--task", "pictures", *out, "--model", "minilm")
