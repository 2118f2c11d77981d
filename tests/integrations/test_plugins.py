"""The plug-ins, through the packages that they plug into. None is installed for `make test`, which skips these tests.

axolotl 0.19, ms-swift 4.6 and LLaMA-Factory 0.9.5 were seen working.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny import batch, build

from lor2c.training.imlor2c import IMCallback


def trains(model) -> None:
    """One backward reaches the adapter's parameters and nothing else."""
    model(**batch("Llama")).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if ".lor2c" in name
    }


def test_axolotl(tmp_path):
    """Its manager finds the plug-in by name, its loader gets the adapter from it, and its Trainer the callback."""
    base = pytest.importorskip("axolotl.integrations.base")
    DictDefault = pytest.importorskip("axolotl.utils.dict").DictDefault
    manager = base.PluginManager.get_instance()
    manager.register("lor2c.integrations.axolotl.LoR2CPlugin")
    assert manager.supports_adapter("lor2c") and "lor2c.integrations.axolotl.LoR2CArgs" in manager.get_input_args()
    settings = {"adapter": "lor2c", "lor2c": {"r": 2, "spans": [[0, 1], [2, 2]]}, "imlor2c": {"max_merges": 1}}
    model, config = manager.load_adapter(build("Llama"), DictDefault(settings))
    assert str(model.base_model.layout()) == "[0..1] [2]" and config.r == 2
    trains(model)
    [callback] = manager.add_callbacks_post_trainer(DictDefault(settings), SimpleNamespace())
    assert isinstance(callback, IMCallback) and callback.settings.max_merges == 1
    model.save_pretrained(tmp_path)
    again, _ = manager.load_adapter(build("Llama"), DictDefault(settings | {"lora_model_dir": str(tmp_path)}), inference=True)
    assert again.base_model.layout() == model.base_model.layout()
    from lor2c.integrations.axolotl import LoR2CArgs

    assert LoR2CArgs(lor2c={"r": 2}).lor2c == {"r": 2}


def test_swift(tmp_path):
    """Its table has the tuner once the module is imported; saving and loading are those of its PEFT tuner."""
    plugin = pytest.importorskip("swift.tuner_plugin")
    import lor2c.integrations.swift  # noqa: F401

    tuner = plugin.tuners_map["lor2c"]
    model = tuner.prepare_model(SimpleNamespace(lora_rank=2, lora_alpha=4, lora_dropout=0.0), build("Llama"))
    trains(model)
    tuner.save_pretrained(model, str(tmp_path))
    again = tuner.from_pretrained(build("Llama"), str(tmp_path))
    assert again.base_model.layout() == model.base_model.layout()


def test_llamafactory(tmp_path):
    """Its registry calls the function under the name in the configuration."""
    peft = pytest.importorskip("llamafactory.v1.plugins.model_plugins.peft")
    import lor2c.integrations.llamafactory  # noqa: F401

    model = peft.PeftPlugin("lor2c")(build("Llama"), {"name": "lor2c", "r": 2}, True)
    trains(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model.eval()(**batch("Llama")).logits
    again = peft.PeftPlugin("lor2c")(build("Llama"), {"name": "lor2c", "adapter_name_or_path": str(tmp_path)}, False)
    assert torch.equal(again.eval()(**batch("Llama")).logits, want)
