"""A U-Net with random weights learns photographs with captions: whole runs, through diffusers' own files."""

import json
from functools import cache
from pathlib import Path
from string import ascii_lowercase, digits

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as T
from conftest import refused
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from lor2c.data.drawing import Painter, noise_loss
from lor2c.runs.job import prepare
from lor2c.runs.recipes import make_run
from lor2c.runs.train import train

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Painter, "steps", 2)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Stable Diffusion's parts, each as small as it can be, saved by diffusers."""
    place = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    words = [
        *ascii_lowercase,
        *(f"{letter}</w>" for letter in ascii_lowercase + digits),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (place / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = T.CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=16)
    sizes = dict(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    ids = dict(bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1)
    text = T.CLIPTextModel(T.CLIPTextConfig(**sizes, **ids, max_position_embeddings=16))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = dict(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    diffusers.StableDiffusionPipeline(**parts, **none).save_pretrained(place / "sd")
    return str(place / "sd")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sixteen parts of scikit-learn's two photographs, as files beside a metadata.jsonl."""
    place = tmp_path_factory.mktemp("rows")
    (place / "drawings").mkdir()
    lines = []
    for picture, name in zip(load_sample_images().images, ("temple", "flower"), strict=True):
        for n in range(8):
            file = f"{name}-{n}.png"
            Image.fromarray(picture).crop((80 * n, 100, 80 * n + 80, 180)).save(place / "drawings" / file)
            lines.append(json.dumps({"file_name": file, "text": f"a {name} part {n}"}))
    (place / "drawings/metadata.jsonl").write_text("\n".join(lines))
    return place


def run_of(method: str, model: str, data: Path, **changes):
    settings = dict(epochs=2, batch_size=4, lr=1e-2, rank=4, alpha=8, held_out=4, device="cpu", data_dir=str(data))
    return make_run("drawings", method, model, **{**settings, **changes})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """Folder and record of an undisturbed run of this method, trained once."""
    place = tmp_path_factory.mktemp("runs")
    return cache(lambda method: (place / method, train(run_of(method, base, data), place / method)))


@pytest.mark.parametrize("method", ["lora", "reslora-is"])
def test_end_to_end(method, base, data, trained, tmp_path):
    """The loss on held-out rows falls, the record's is that of the adapter on disk, and pictures are drawn on the way."""
    folder, record = trained(method)
    metrics = record["metrics"]
    assert metrics["best"]["loss"] < metrics["baseline"]["loss"] and record["rows"]["validation"] == 4
    kind = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert kind["peft_type"] == ("RESLORA" if "reslora" in method else "LORA")
    numbers = sum(t.numel() for name, t in tensors(folder).items() if name.endswith(".weight"))
    assert record["adapter_parameters"] == record["trainable_parameters"] == numbers
    unet = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    tuned = PeftModel.from_pretrained(unet, folder / "adapter").eval()
    job = prepare(run_of(method, base, data), tmp_path)
    assert isinstance(job.tokenizer, Painter) and job.tokenizer.draw(["a temple"]).size == (16, 16)
    rows = job.data["validation"][:]
    given = [rows[name] for name in ("latents", "states", "noise", "times")]
    with torch.no_grad():
        loss = noise_loss(tuned, job.tokenizer.scheduler, *given)
    assert loss.item() == pytest.approx(metrics["best"]["loss"], rel=1e-5)
    drawn = sorted(file.name for file in (folder / "pictures").iterdir())
    assert drawn == [f"step-{3 * epoch:06}.png" for epoch in range(3)]
    pixels = [Image.open(folder / "pictures" / name) for name in drawn]
    assert pixels[0].size == (32, 16) and pixels[0].tobytes() != pixels[-1].tobytes()


def test_interrupted_and_resumed(cut_and_resumed, base, data, trained):
    folder, whole = trained("reslora-is")
    cut = cut_and_resumed(run_of("reslora-is", base, data), folder, whole)
    for file in (folder / "pictures").iterdir():
        assert file.read_bytes() == (cut / "pictures" / file.name).read_bytes()


def test_parquet_and_checkpointing(base, data, tmp_path):
    """The same rows as Parquet, and activations computed again: the same loss as without."""
    rows = [json.loads(line) for line in (data / "drawings/metadata.jsonl").read_text().splitlines()]
    made = [
        {"image": {"bytes": (data / "drawings" / r["file_name"]).read_bytes(), "path": None}, "text": r["text"]}
        for r in rows
    ]
    (tmp_path / "drawings").mkdir()
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "drawings/train.parquet")
    plain = train(run_of("reslora-bs", base, data, epochs=1), tmp_path / "plain")
    again = train(run_of("reslora-bs", base, tmp_path, epochs=1, checkpointing=True), tmp_path / "again")
    assert again["metrics"]["last"]["loss"] == pytest.approx(plain["metrics"]["last"]["loss"], rel=1e-5)


def test_a_bad_row_is_named(capsys, base, data, tmp_path):
    (tmp_path / "drawings").mkdir()
    (tmp_path / "drawings/1.png").write_bytes(b"no picture")
    good = data / "drawings/temple-0.png"
    out = ("--model", base, "--data-dir", tmp_path, "--output-dir", tmp_path / "run")
    for line, said in (
        ({"file_name": "1.png", "text": "a"}, "metadata.jsonl row 1: the picture cannot be read"),
        ({"file_name": "2.png", "text": "a"}, "metadata.jsonl row 1: the picture cannot be read"),
        ({"file_name": str(good), "text": " "}, "metadata.jsonl row 1: no caption, found ' '"),
        ({"file_name": str(good)}, "metadata.jsonl row 1: no value in column text"),
        ({"text": "a"}, "metadata.jsonl row 1: no value in column image"),
        ({"file_name": str(good), "text": "a"}, "held_out (--held-out) must be from 1 to 1 of 2 rows, found 32"),
    ):
        lines = [json.dumps(row) for row in ({"file_name": str(good), "text": "a"}, line)]
        (tmp_path / "drawings/metadata.jsonl").write_text("\n".join(lines))
        assert said in refused(capsys, "draw", "--task", "drawings", *out), said
    assert "does not fit a U-Net" in refused(capsys, "draw", "--task", "drawings", *out, "--method", "lor2c")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_pipeline(capsys, data, tmp_path):
    out = ("--data-dir", data, "--output-dir", tmp_path / "run")
    said = refused(capsys, "draw", "--task", "drawings", "--model", tmp_path, *out)
    assert "is a folder without a model_index.json" in said
