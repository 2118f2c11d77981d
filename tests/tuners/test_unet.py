"""ResLoRA on a U-Net of diffusers: which layers are linked, the life of an adapter, and both libraries' files."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

import lor2c
from lor2c.tuners.chains import Factor
from lor2c.tuners.stack import unet_layers

diffusers = pytest.importorskip("diffusers")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SHORTCUTS = ("input", "block", "middle")


def build(dtype=torch.float32) -> nn.Module:
    """Two blocks down with attention and one without, a middle, and the way up: Stable Diffusion's outline."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16, 16), norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).to(dtype).eval()  # fmt: skip


BASE = build()


def batch(dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sample, states = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 12, generator=draw)
    return dict(sample=sample.to(dtype), timestep=torch.tensor([3, 700]), encoder_hidden_states=states.to(dtype))


def adapted(std=0.2, dtype=torch.float32, base=None, **settings):
    config = lor2c.ResLoRAConfig(**dict(r=2, alpha=6, target_modules=TARGETS) | settings)
    torch.manual_seed(1)
    model = get_peft_model(base or copy.deepcopy(BASE).to(dtype), config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=std)
    return model


def out(model, **given):
    return model(**batch(**given)).sample


def chains(model) -> list[list[str]]:
    found = {id(m.chain): m.chain.paths for m in model.modules() if isinstance(m, Factor)}
    return [[path.partition(".attentions")[0] for path in paths] for paths in found.values()]


def test_layers_are_found_in_the_order_in_which_they_run():
    ran, tokens = [], []
    base = build()

    def note(module, args):
        ran.append(names[module])
        tokens.append(args[0].shape[1])

    names = {m: path for path, m in base.named_modules() if type(m).__name__ == "BasicTransformerBlock"}
    for module in names:
        module.register_forward_pre_hook(note)
    out(base)
    assert list(unet_layers(base)) == ran and len(ran) == 11
    assert [64 // 4**level for level in unet_layers(base).values()] == tokens
    assert set(unet_layers(nn.ModuleDict({"unet": base}))) == {f"unet.{path}" for path in ran}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_neighbours_of_one_size_are_linked(shortcut):
    """Queries, keys, values and outputs of own and of cross attention have a chain each: eight times as many."""
    down, up = [["down_blocks.0"] * 2, ["down_blocks.1"] * 2], [["up_blocks.1"] * 3, ["up_blocks.2"] * 3]
    wanted = [*down, *up]  # the middle has the width of its neighbours, and a quarter of their tokens
    if shortcut == "block":
        wanted = [down[0], down[1] + ["mid_block"] + up[0], up[1]]
    assert sorted(chains(adapted(shortcut=shortcut))) == sorted(wanted * 8)
    named = adapted(shortcut=shortcut, layers=["down_blocks.0.attentions"])
    assert sorted(chains(named)) == [["down_blocks.0"] * 2] * 8


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_written_out(shortcut):
    """Eq. 2, 3 and 4 with hooks on the base, in float64, up to two blocks before."""
    model = adapted(dtype=torch.float64, shortcut=shortcut, pre_num=2)
    base, given = copy.deepcopy(BASE).double(), {}
    layers = {path: m for path, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 11 * 8
    pair = {p: (m.lora_A["default"].weight, m.lora_B["default"].weight) for p, m in layers.items()}

    def hook(path):
        rest = path.partition("transformer_blocks.0.")[2]
        order = [f"{layer}.{rest}" for layer in unet_layers(base)]
        levels = unet_layers(base).values() if shortcut != "block" else [0] * 11
        sizes = [(base.get_submodule(p).weight.shape, level) for p, level in zip(order, levels, strict=True)]
        n, same = order.index(path), [a == b for a, b in pairwise(sizes)]
        before = []
        while len(before) < 2 and n - len(before) > 0 and same[n - len(before) - 1]:
            before.append(order[n - len(before) - 1])
        linked = before or (n < 10 and same[n])

        def add(module, args, output):
            given[path] = args[0]
            A, B = pair[path]
            if shortcut == "block":
                delta = sum(args[0] @ (pair[p][1] @ pair[p][0]).T for p in (path, *before))
            elif shortcut == "middle":
                delta = sum(given[p] @ pair[p][0].T for p in (path, *before)) @ B.T
            else:
                x = sum((given[p] for p in before), args[0] * (2 if linked and not before else 1))
                delta = x @ A.T @ B.T
            return output + 3 * delta

        base.get_submodule(path).register_forward_hook(add)

    for path in layers:
        hook(path)
    torch.testing.assert_close(out(model, dtype=torch.float64), out(base, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_life(shortcut, tmp_path):
    """No-op at zero, only the adapter learns, disable, unload, copies, a second adapter, and back from a file."""
    want = out(BASE)
    assert torch.equal(out(adapted(0, shortcut=shortcut)), want)
    model = adapted(shortcut=shortcut)
    tuned = out(model)
    assert not torch.allclose(tuned, want, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(out(model), want)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(twin), tuned)
    model.save_pretrained(tmp_path)
    assert torch.equal(out(PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path).eval()), tuned)
    model.add_adapter("other", lor2c.ResLoRAConfig(r=1, target_modules=["to_q"]))
    assert torch.equal(out(model.eval()), tuned)
    model.delete_adapter("other")
    model.train()
    out(model).square().mean().backward()
    learn = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learn == {n for n, p in model.named_parameters() if p.requires_grad} and len(learn) == 2 * 11 * 8
    assert all("lora_" in n for n in learn)
    assert torch.equal(out(model.eval().unload()), want)


def test_as_many_numbers_as_lora():
    numbers = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)  # noqa: E731
    lora = get_peft_model(copy.deepcopy(BASE), LoraConfig(r=2, target_modules=TARGETS))
    assert {numbers(adapted(shortcut=shortcut)) for shortcut in SHORTCUTS} == {numbers(lora)}


def test_bf16_base():
    model = adapted(dtype=torch.bfloat16)
    kinds = {"lora_" in n: p.dtype for n, p in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    torch.testing.assert_close(out(model, dtype=torch.bfloat16).float(), out(adapted()), rtol=0.1, atol=0.1)


def test_checkpointing():
    """The block shortcut has the same gradients; the others refuse, as with any model."""
    gradients = []
    for recompute in (False, True):
        model = adapted().train()
        if recompute:
            model.base_model.model.enable_gradient_checkpointing()
        out(model).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1])
    reading = adapted(shortcut="input").train()
    reading.base_model.model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="activation checkpointing does not keep"):
        out(reading)


def test_a_failed_link_is_told():
    with pytest.raises(ValueError, match="nothing to link"):
        adapted(target_modules=["conv_in_none", "linear_1"])


def test_folded_for_diffusers_alone(tmp_path):
    """Block shortcuts fold exactly, with ranks of their own; diffusers saves the result and loads it, and all in it is plain."""
    model = adapted(pre_num=2)
    folded = model.base_model.fold()
    assert len({len(A) for name, A in folded.tensors.items() if "lora_A" in name}) == 3
    assert folded.error(model, **batch())["relative"] < 1e-6
    layers = {name.removeprefix("base_model.model."): tensor for name, tensor in folded.tensors.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=folded.config.to_dict()
    )
    base = build()
    base.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    torch.testing.assert_close(out(base), out(model), rtol=1e-4, atol=1e-5)
    assert [type(config) for config in base.peft_config.values()] == [LoraConfig]
    assert not any(isinstance(m, Factor) for m in base.modules()) and out(base).sub(out(BASE)).abs().max() > 1e-2


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_folded_by_norms(shortcut):
    model = adapted(shortcut=shortcut).train()
    with torch.no_grad():
        out(model)
    for how in ("input", "weight"):
        assert 0 < model.base_model.fold(how).error(model, **batch())["relative"] < 1


def test_added_by_diffusers():
    """`unet.add_adapter` puts the same blocks on."""
    base = build()
    base.add_adapter(lor2c.ResLoRAConfig(r=2, alpha=6, target_modules=TARGETS, shortcut="input"))
    model = adapted(shortcut="input")
    assert sorted(chains(base)) == sorted(chains(model))
    theirs = {n.replace(".default", ""): p for n, p in base.named_parameters() if "lora_" in n}
    for name, tensor in get_peft_model_state_dict(model).items():
        if name.endswith(".weight"):
            theirs[name.removeprefix("base_model.model.")].data.copy_(tensor)
    assert torch.equal(out(base), out(model))
