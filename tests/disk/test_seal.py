"""A damaged adapter is an error at every door: what is missing, added or changed is never another model."""

import json
from pathlib import Path

import pytest
import torch
from conftest import refused
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import adapted, batch, build
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from lor2c.disk.seal import check_weights, read_weights, seal
from lor2c.tuners.config import LoR2CConfig

LAYERS = "base_model.model.bert.encoder.layer"


def moved(folder: Path, **config):
    """An adapter with a residual, a longer one and injected LoRA, saved; its file."""
    model = adapted("BERT", spans=[[0, 0], [1, 2]], injected={3: [1, 4]}, **config)
    torch.nn.init.normal_(model.get_submodule(f"{LAYERS}.3.attention.self.query").lor2c_lora_B["default"].weight)
    model.save_pretrained(folder)
    return model, folder / "adapter_model.safetensors"


def rewrite(file: Path, change, sealed: bool) -> None:
    """Change the tensors in place, under the seal or without it."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() if sealed else {"format": "pt"}
    change(tensors)
    save_file(tensors, file, metadata)


def without_residual(tensors):
    for name in [name for name in tensors if f"{LAYERS}.2.lor2c" in name]:
        del tensors[name]


def without_prefix(tensors):
    for name in [name for name in tensors if f"{LAYERS}.3.attention.self.query" in name]:
        tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


def another_span(tensors):
    tensors[f"{LAYERS}.2.lor2c.lor2c_span"][0] = 2


def deeper(tensors):
    tensors[f"{LAYERS}.2.lor2c.lor2c_span"][2] = 2**38


def deeper_mark(tensors):
    tensors[f"{LAYERS}.3.attention.self.query.lor2c_injected"][1] += 2**38


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "not sealed"])
@pytest.mark.parametrize("change", [without_residual, without_prefix, another_span, deeper, deeper_mark])
def test_another_structure_is_refused_and_inspected_in_no_time(capsys, tmp_path, change, sealed):
    _, file = moved(tmp_path)
    rewrite(file, change, sealed)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(build("BERT"), tmp_path)
    if change is not without_prefix or sealed:  # without the base, nothing says that there was a prefix
        refused(capsys, "inspect", tmp_path)


def test_a_flipped_bit_is_seen_at_every_door(tmp_path):
    """PEFT's and transformers' loaders, resuming, and the best model at the end."""
    build("BERT").save_pretrained(tmp_path / "base")
    _, file = moved(tmp_path / "adapter")
    config = json.loads((file.parent / "adapter_config.json").read_text())
    (file.parent / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )

    def resume():
        arguments = TrainingArguments(tmp_path / "run", max_steps=1, report_to=[], use_cpu=True)
        Trainer(adapted("BERT"), arguments)._load_from_checkpoint(str(file.parent))

    doors = [
        lambda: PeftModel.from_pretrained(build("BERT"), file.parent),
        lambda: adapted("BERT").load_adapter(str(file.parent), "other"),
        lambda: adapted("BERT").load_adapter(str(file.parent), "default"),
        lambda: AutoPeftModelForSequenceClassification.from_pretrained(file.parent),
        lambda: AutoModelForSequenceClassification.from_pretrained(file.parent),
        lambda: build("BERT").load_adapter(str(file.parent)),
        resume,
    ]
    for door in doors:
        door()
    content = bytearray(file.read_bytes())
    content[-6] ^= 0x40
    file.write_bytes(content)
    for door in doors:
        with pytest.raises(ValueError, match="its tensors are not those that were saved. If you changed it on purpose"):
            door()
    save_file(load_file(file), file, {"format": "pt"})
    for door in doors:
        door()


def test_changed_settings_are_refused_and_a_moved_base_is_not(tmp_path):
    moved(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for changed in ({"alpha": 5}, {"r": 4}, {"spans": None}, {"injected": {"3": [1, 5.0]}}, {"share": True}):
        file.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=f"saved with {next(iter(changed))} = "):
            PeftModel.from_pretrained(build("BERT"), tmp_path)
    file.write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere", "inference_mode": False}))
    PeftModel.from_pretrained(build("BERT"), tmp_path)
    again = LoR2CConfig.from_pretrained(tmp_path)
    again.alpha = 8
    again.save_pretrained(tmp_path)  # the way to change a setting: through the configuration
    assert PeftModel.from_pretrained(build("BERT"), tmp_path).peft_config["default"].alpha == 8


@pytest.mark.parametrize("config", [{}, {"share": True}, {"injected": {3: [1, 4]}, "spans": []}], ids=str)
def test_what_is_saved_is_read(tmp_path, config):
    model = adapted("BERT", **config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    check_weights(file)
    before = file.read_bytes()
    model.save_pretrained(tmp_path)
    assert file.read_bytes() == before, "the same adapter, the same bytes"
    seal(file)
    assert file.read_bytes() == before and read_weights(file).keys() == load_file(file).keys()
    again = PeftModel.from_pretrained(build("BERT"), tmp_path).eval()
    assert torch.equal(again(**batch("BERT")).logits, model(**batch("BERT")).logits)


def test_other_methods_are_left_alone(tmp_path):
    """A file of PEFT's LoRA has no seal, and is read as PEFT reads it."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(build("BERT"), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    rewrite(tmp_path / "adapter_model.safetensors", lambda tensors: tensors.popitem(), sealed=False)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(build("BERT"), tmp_path)


def test_a_configuration_is_the_same_after_resuming(tmp_path):
    """The tensors tell an alpha as a float, and 16.0 was written for 16."""
    moved(tmp_path / "first")
    again = adapted("BERT")
    again.load_adapter(str(tmp_path / "first"), "default", is_trainable=True)
    again.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "adapter_config.json").read_text() for name in ("first", "second"))
    assert json.loads(first)["injected"] == {"3": [1, 4]} and second == first
