"""One A for all residuals: one parameter through merges, copies and casts, stored once, and counted once."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import adapted, batch, build
from transformers import AutoModelForCausalLM, RobertaConfig

import lor2c
from lor2c.maths.layout import Layout
from lor2c.training.surgery import inject_lora, merge_modules
from lor2c.tuners.injection import injected
from lor2c.tuners.residual import pairs_of, residuals
from lor2c.tuners.share import shared_A

D, R = 16, 4  # of the models of `tiny`, and of the adapters here
STACKS = ["BERT", "Llama", "T5 decoder"]
each_stack = pytest.mark.parametrize("stack", STACKS)


def shared(stack="Llama", dtype=torch.float32, **settings):
    """A residual around every layer of four, one A, and B as if trained."""
    return adapted(stack, dtype, **dict(r=R, spans=None, share=True, injected=None) | settings)


def downs(model, name="default"):
    return [A for A, _ in pairs_of(model, name).values()]


def trained(model):
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)


def one_tensor(model, count, name="default"):
    """Every one of `count` residuals holds the very same parameter."""
    found = downs(model, name)
    return len(found) == count and all(A is found[0] for A in found)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def step(model, optimizer, stack="Llama"):
    model(**batch(stack)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# Counted once


def test_count_of_the_paper():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(RobertaConfig(is_decoder=True))
        model = get_peft_model(base, lor2c.LoR2CConfig(r=8, share=True))
    assert trained(model) == 79_872 == 12 * 768 * 8 + 768 * 8
    assert model.base_model.layout().parameters(768, 8, share=True) == 79_872


@each_stack
def test_one_parameter_and_a_no_op_at_zero(stack):
    model = shared(stack, std=0)
    assert one_tensor(model, 4) and downs(model)[0] is shared_A(model, "default")
    assert trained(model) == 4 * D * R + D * R
    assert [n for n, _ in model.named_parameters() if "lor2c_A" in n] == [
        next(n for n, _ in model.named_parameters(remove_duplicate=False) if "lor2c_A" in n)
    ]
    b = batch(stack)
    assert torch.equal(model(**b).logits, build(stack)(**b).logits)


@each_stack
def test_gradient_is_the_sum_over_the_residuals(stack):
    """Against four copies of A that are parameters of their own."""
    one, apart = shared(stack, torch.float64), shared(stack, torch.float64, share=False)
    for (_, own), (_, source) in zip(residuals(apart), residuals(one), strict=True):
        for matrix, other in zip(own.pair("default"), source.pair("default"), strict=True):
            matrix.load_state_dict(other.state_dict())
    assert len({id(A) for A in downs(apart)}) == 4
    for model in (one.double(), apart.double()):
        model(**batch(stack, dtype=torch.float64)).loss.backward()
    parts = torch.stack([A.grad for A in downs(apart)])
    assert all(part.any() for part in parts)
    torch.testing.assert_close(shared_A(one, "default").grad, parts.sum(0), rtol=1e-9, atol=1e-12)
    own = [[B.grad for _, B in pairs_of(model, "default").values()] for model in (one, apart)]
    torch.testing.assert_close(*own, rtol=1e-9, atol=1e-12)


def test_the_optimizer_moves_it_once():
    model = shared()
    optimizer = optimizer_of(model)
    assert sum(p is shared_A(model, "default") for p in optimizer.param_groups[0]["params"]) == 1
    A, before = shared_A(model, "default"), shared_A(model, "default").clone()
    step(model, optimizer)
    assert (A - before).abs().max() < 1.05e-2  # Adam's first step has the size of the learning rate
    assert not torch.equal(A, before) and one_tensor(model, 4)


# One tensor, whatever happens


def test_merges_and_injections_keep_it():
    """Each merge removes d r, an injection one B only; A and its Adam state stay, to the last residual."""
    model = shared()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    A = shared_A(model, "default")
    moment, counts = optimizer.state[A]["exp_avg"], [trained(model)]
    for second in (1, 2):
        merge_modules(model, 0, second, optimizer=optimizer)
        counts.append(trained(model))
    assert [a - b for a, b in zip(counts, counts[1:], strict=False)] == [D * R, D * R]
    assert one_tensor(model, 2) and shared_A(model, "default") is A
    inject_lora(model, 3, optimizer=optimizer)  # Llama's v is (d / 2, d): one key and value head of two
    assert trained(model) == counts[-1] - D * R + R // 2 * (D + D) + R // 2 * (D + D // 2)
    assert one_tensor(model, 1) and shared_A(model, "default") is A
    assert optimizer.state[A]["exp_avg"] is moment and sum(p is A for p in optimizer.param_groups[0]["params"]) == 1
    step(model, optimizer)


def test_injected_everywhere_there_is_none_and_it_comes_back_as_one():
    model = shared()
    full = model.base_model.layout()
    for layer in range(4):
        inject_lora(model, layer)
    assert shared_A(model, "default") is None and len(list(injected(model))) == 8
    model.base_model.set_layout(full)
    assert one_tensor(model, 4) and not list(injected(model))


def test_a_layer_that_gets_a_residual_gets_the_shared_one():
    model = shared(spans=[[0, 0], [1, 1]])
    A = shared_A(model, "default")
    model.base_model.set_layout(Layout(4, ((0, 0), (1, 1), (2, 3))))
    assert one_tensor(model, 3) and shared_A(model, "default") is A
    model.base_model.set_layout(Layout(4, ((2, 3),)))  # the first residual, under which it is saved, goes
    assert one_tensor(model, 1) and shared_A(model, "default") is A


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_share_among_themselves(twin_of):
    model = shared()
    twin = twin_of(model)
    assert one_tensor(twin, 4) and downs(twin)[0] is not downs(model)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_keep_it(dtype):
    model = shared().to(dtype)
    assert one_tensor(model, 4) and shared_A(model, "default").dtype == dtype
    merge_modules(model, 0, 1)
    assert one_tensor(model, 3) and shared_A(model, "default").dtype == dtype


@each_stack
def test_bf16_base_has_one_float32(stack):
    """PEFT casts what it finds among the modules, where A is once."""
    model = shared(stack, torch.bfloat16)
    assert one_tensor(model, 4) and shared_A(model, "default").dtype == torch.float32
    assert trained(model) == 5 * D * R
    optimizer = optimizer_of(model)
    model(**batch(stack, dtype=torch.bfloat16)).loss.backward()
    optimizer.step()
    assert one_tensor(model, 4)


def test_two_adapters_one_of_which_shares():
    model = shared()
    b = batch("Llama")
    want = model(**b).logits
    model.add_adapter("apart", lor2c.LoR2CConfig(r=R, dropout=0.0))
    model.add_adapter("also", lor2c.LoR2CConfig(r=R, dropout=0.0, share=True))
    model.eval()
    assert one_tensor(model, 4) and one_tensor(model, 4, "also")
    assert shared_A(model, "also") is not shared_A(model, "default")
    assert len({id(A) for A in downs(model, "apart")}) == 4
    assert torch.equal(model(**b).logits, want)
    model.delete_adapter("apart")
    assert one_tensor(model, 4) and one_tensor(model, 4, "also") and torch.equal(model(**b).logits, want)


# Stored once


def test_the_file_has_it_once(tmp_path):
    sizes = {}
    for share in (True, False):
        shared(share=share, r=64).save_pretrained(tmp_path / str(share))
        file = tmp_path / str(share) / "adapter_model.safetensors"
        sizes[share] = file.stat().st_size, [key[-8] for key in load_file(file) if "span" not in key]
    assert sorted(sizes[True][1]) == ["A", "B", "B", "B", "B"] and sorted(sizes[False][1]) == [*"AAAABBBB"]
    saved = sizes[False][0] - sizes[True][0]
    assert 0 <= saved - 3 * 64 * D * 4 < 3 * 256  # three A in float32, and their names in the header


@pytest.mark.parametrize("low_cpu", [False, True], ids=["plain", "low_cpu_mem_usage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_stack
def test_loaded_as_one(stack, dtype, low_cpu, tmp_path):
    model = shared(stack, dtype)
    merge_modules(model, 1, 2)
    model.save_pretrained(tmp_path)
    base = build(stack, dtype)
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu, is_trainable=True).eval()
    assert one_tensor(again, 3) and trained(again) == trained(model)
    b = batch(stack, dtype=dtype)
    assert torch.equal(again(**b).logits, model(**b).logits)


def test_resumed_into_a_residual_per_layer(tmp_path):
    """As a Trainer resumes: a fresh model, tensors of another structure, and an optimizer's state by position."""
    model = shared()
    optimizer = optimizer_of(model)
    merge_modules(model, 0, 1, optimizer=optimizer)
    inject_lora(model, 3, optimizer=optimizer)
    step(model, optimizer)
    model.save_pretrained(tmp_path)
    fresh = shared(std=0)
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert fresh.base_model.layout() == model.base_model.layout() and one_tensor(fresh, 2)
    assert torch.equal(fresh(**batch("Llama")).logits, model(**batch("Llama")).logits)
    resumed = optimizer_of(fresh)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (fresh, resumed)):
        step(m, o)
    assert torch.equal(fresh(**batch("Llama")).logits, model(**batch("Llama")).logits)


def test_saved_and_loaded_where_the_first_layer_has_none(tmp_path):
    model = shared()
    inject_lora(model, 0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("Llama"), tmp_path).eval()
    assert one_tensor(again, 3)
    assert torch.equal(again(**batch("Llama")).logits, model(**batch("Llama")).logits)


def change_file(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def test_a_file_without_it_is_refused(tmp_path):
    shared().save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: {key: t for key, t in tensors.items() if "lor2c_A" not in key})
    with pytest.raises(ValueError, match=r"damaged: lor2c_A of layer model\.layers\.0 is missing"):
        PeftModel.from_pretrained(build("Llama"), tmp_path)


def test_a_file_with_one_for_each_is_refused(tmp_path):
    """Loading them one after another into the same parameter would leave the last one, silently."""
    apart, model = shared(share=False), shared()
    apart.save_pretrained(tmp_path)
    before = model(**batch("Llama")).logits
    with pytest.raises(ValueError, match="4 down-projections lor2c_A that differ"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model.eval()(**batch("Llama")).logits, before)


def test_a_shared_file_is_refused_where_each_has_its_own(tmp_path):
    shared().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lor2c_A of layer .* is missing, or it was saved with share=True"):
        shared(share=False).load_adapter(tmp_path, "default")
