"""Many adapters on one base: a batch whose rows have adapters of their own, and one adapter in the place of another."""

import itertools
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from tiny import STACKS, batch, build, layers_path, task_type

import lor2c
from lor2c.tuners.residual import residuals

ADAPTERS = {
    "spans": dict(spans=[[0, 0], [1, 3]]),
    "injected": dict(spans=[[0, 1], [3, 3]], injected={2: [2, 4]}, r=3),
    "hybrid": dict(spans=[[0, 2]], lora=[2, 4], ranks={0: 1}),
    "shared": dict(share=True, spans=[[0, 1], [2, 2], [3, 3]]),
}
NAMES = ["hybrid", "spans", "__base__", "injected", "spans", "shared"]


def filled(model, seed=1):
    """Made-up values in all that was trained."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lor2c_" in name or "lora_" in name or "modules_to_save" in name:
            p.data = torch.randn(p.shape, generator=g).to(p) * 0.2
    return model.eval()


def config(stack, **settings):
    whole = dict(r=2, alpha=4, dropout=0.0, layers=layers_path(stack), task_type=task_type(stack))
    return lor2c.LoR2CConfig(**whole | settings)


def crowded(stack, dtype=torch.float64, **changes):
    """A base with four adapters of four structures."""
    configs = {name: config(stack, **settings | changes) for name, settings in ADAPTERS.items()}
    model = get_peft_model(build(stack, dtype), configs["spans"], adapter_name="spans")
    for name in configs.keys() - {"spans"}:
        model.add_adapter(name, configs[name])
    return filled(model)


def rows_of(stack, dtype=torch.float64):
    """Six rows, some of them padded."""
    parts = [batch(stack, seed, dtype) for seed in (1, 2, 3)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "labels" or stack.startswith("T5")}


@torch.no_grad()
def alone(model, name, run):
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


def check_rows(model, inputs, names=NAMES):
    want = {name: alone(model, name, lambda: model(**inputs).logits) for name in {*names}}
    first = next(iter(want.values()))
    assert all((first - other).abs().max() > 1e-3 for other in list(want.values())[1:])
    for active in {*names} - {"__base__"}:
        model.set_adapter(active)
        with torch.no_grad():
            mixed = model(**inputs, adapter_names=names).logits
        for i, name in enumerate(names):
            torch.testing.assert_close(mixed[i], want[name][i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("stack", [stack for stack in STACKS if stack != "RoBERTa"])
def test_each_row_is_as_its_adapter_alone(stack):
    model = crowded(stack)
    check_rows(model, rows_of(stack))
    assert not any(residual._held.tensors or residual._held.rows for _, residual in residuals(model))


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_rows_of_reslora(shortcut):
    settings = dict(r=2, target_modules=["q_proj", "v_proj"], shortcut=shortcut, task_type="CAUSAL_LM", dropout=0.0)
    model = get_peft_model(build("Llama", torch.float64), lor2c.ResLoRAConfig(**settings), adapter_name="one")
    model.add_adapter("two", lor2c.ResLoRAConfig(**settings | dict(r=3)))
    check_rows(filled(model), rows_of("Llama"), ["two", "one", "__base__", "one", "two", "two"])


def test_units_of_each_row():
    model = crowded("Llama", torch.float32, units="stream")
    for name in ADAPTERS:
        model.set_adapter(name)
        lor2c.calibrate(model, [batch("Llama")])
    assert all((units != 1).any() for _, one in residuals(model) for units in one.lor2c_units.values())
    check_rows(model.double().eval(), rows_of("Llama"))


def test_heads_of_some_adapters_only():
    """PEFT passes a head by if the active adapter has none: the rows of others need theirs all the same."""
    model = get_peft_model(build("BERT", torch.float64), config("BERT"), adapter_name="head")
    model.add_adapter("none", config("BERT", task_type=None, modules_to_save=[]))
    check_rows(filled(model), rows_of("BERT"), ["none", "head", "__base__", "head", "none", "head"])


@pytest.mark.parametrize("stack", ["Llama", "T5 decoder", "T5 encoder"])
def test_generation(stack):
    model, inputs = crowded(stack), rows_of(stack)
    inputs.pop("labels", None)
    inputs["attention_mask"][::2, :4] = 0
    for ways in (dict(), dict(num_beams=2, num_return_sequences=2), dict(num_beams=3), dict(use_cache=False)):
        settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, **ways)
        copies = ways.get("num_return_sequences", 1)
        want = {name: alone(model, name, partial(model.generate, **inputs, **settings)) for name in {*NAMES}}
        mixed = model.generate(**inputs, **settings, adapter_names=NAMES)
        for i, name in enumerate(NAMES):
            part = slice(i * copies, (i + 1) * copies)
            assert torch.equal(mixed[part], want[name][part])
        assert len({tuple(tokens.flatten().tolist()) for tokens in want.values()}) > 1


def test_what_rows_cannot_be(recwarn):
    model = crowded("BERT")
    inputs = rows_of("BERT")
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    want = model(**inputs).logits
    for names, message in [
        (["spans"] * 5, "5 names for a batch of 6 rows"),
        ([], "0 names for a batch of 6 rows"),
        (["spans"] * 12, "12 names for a batch of 6 rows"),
        (["spans"] * 5 + ["other"], "unknown name in adapter_names 'other': choose one of spans"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**inputs, adapter_names=names)
        assert torch.equal(model(**inputs).logits, want)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        model.train()(**inputs, adapter_names=NAMES)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    roberta = crowded("RoBERTa")
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following modules: Linear"):
        roberta(**rows_of("RoBERTa"), adapter_names=NAMES)


# One adapter in the place of another


def two_folders(stack, folder, kind="spans", **changes):
    """Two adapters of equal structure on disk, with different numbers."""
    for seed in (1, 2):
        model = get_peft_model(build(stack), config(stack, **ADAPTERS[kind] | changes))
        if changes.get("units"):
            model.train()(**batch(stack, seed))
        filled(model, seed).save_pretrained(folder / str(seed))
    return folder / "1", folder / "2"


def load(stack, folder):
    return PeftModel.from_pretrained(build(stack), folder).eval()


@pytest.mark.parametrize(
    "stack, kind, changes",
    [
        *(("Llama", kind, {}) for kind in ADAPTERS),
        ("GPT-2", "injected", {}),
        ("BERT", "injected", {}),
        ("Llama", "shared", dict(units="stream")),
    ],
)
def test_a_swapped_adapter_is_as_loaded_alone(stack, kind, changes, tmp_path):
    first, second = two_folders(stack, tmp_path, kind, **changes)
    model, want = load(stack, first), load(stack, second)
    ways = dict(zip(model.state_dict(), map(id, model.state_dict(keep_vars=True).values()), strict=True))
    hotswap_adapter(model, str(second), "default", torch_device="cpu")
    inputs = batch(stack)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want(**inputs).logits)
        assert not torch.allclose(model(**inputs).logits, load(stack, first)(**inputs).logits, atol=1e-3)
    # not one tensor is another object, so no compiled code is lost
    assert ways == dict(zip(model.state_dict(), map(id, model.state_dict(keep_vars=True).values()), strict=True))


def test_what_cannot_be_swapped_changes_nothing(tmp_path):
    first, _ = two_folders("BERT", tmp_path / "spans")
    model = load("BERT", first)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for n, (changes, message) in enumerate(
        [
            (dict(spans=[[0, 1], [3, 3]], injected={2: [2, 4]}), "can only be swapped for one of the same structure"),
            (dict(spans=[[0, 0], [2, 3]]), "lor2c_span. Load it beside the other with load_adapter"),
            (dict(ranks={0: 1}), "differ in .*layer.0.lor2c.lor2c_"),
            (dict(alpha=8), "for alpha, 4 != 8"),
            (dict(r=3), "for r, 2 != 3"),
            (dict(task_type=None), "differ in base_model.model.classifier.bias"),
        ]
    ):
        _, other = two_folders("BERT", tmp_path / str(n), **changes)
        with pytest.raises(ValueError, match=message):
            hotswap_adapter(model, str(other), "default", torch_device="cpu")
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_compiled_code_outlives_swaps_and_switches(tmp_path):
    first, second = two_folders("Llama", tmp_path, "injected")
    wanted, model = [load("Llama", folder) for folder in (first, second)], load("Llama", first)
    model.load_adapter(second, "second")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    inputs = batch("Llama")
    inputs.pop("labels")

    def check(which):
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, wanted[which](**inputs).logits)
        return counter.frame_count

    for name, which in (("default", 0), ("second", 1)):
        model.set_adapter(name)
        frames = check(which)
    for which, name in itertools.chain(*[enumerate(("default", "second"))] * 2):
        model.set_adapter(name)
        assert check(which) == frames
    hotswap_adapter(compiled, str(first), "second", torch_device="cpu")
    assert check(0) == frames
    torch._dynamo.reset()
