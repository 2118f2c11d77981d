"""Stream units: the plain pair's function, gradients by the chain rule, exact files, the paper untouched, every base."""

import copy

import peft
import pytest
import torch
from datasets import Dataset
from tiny import STACKS, adapted, batch, build, written_out
from transformers import Trainer, TrainingArguments

import lor2c
from lor2c.disk.tensors import folded
from lor2c.maths.layout import Layout
from lor2c.maths.units import in_units
from lor2c.tuners.residual import pairs_of, residuals, units_of

POST_NORM = {"BERT", "RoBERTa", "DistilBERT", "DeBERTa-v2"}
quiet = pytest.mark.filterwarnings("ignore:units='stream' on a model whose layers end")


def plain_twin(model):
    """The same function as a published adapter: units folded into the pairs."""
    twin = adapted("Llama", torch.float64, std=0)
    for span, pair in pairs_of(model, "default").items():
        plain = in_units(*pair, units_of(model, "default")[span])
        for p, value in zip(pairs_of(twin, "default")[span], plain, strict=True):
            p.data.copy_(value)
    return twin


def measured(stack: str = "Llama", dtype: torch.dtype = torch.float64, **config):
    model = adapted(stack, dtype, std=0, units="stream", **config)
    lor2c.calibrate(model, [batch(stack, 7, dtype)])
    for _, B in pairs_of(model, "default").values():
        torch.nn.init.normal_(B, std=0.2)
    return model


@quiet
@pytest.mark.parametrize("stack", STACKS)
def test_the_first_batch_measures_and_changes_nothing(stack):
    model, plain = adapted(stack, std=0, units="stream"), adapted(stack, std=0)
    x = batch(stack)
    with torch.no_grad():
        model(**x)
    assert all((units == 1).all() for units in units_of(model, "default").values())
    assert torch.equal(model(**x).logits, plain(**x).logits)
    seen = units_of(model, "default")
    assert len(seen) == 2 and all((units != 1).any() and (units.log2() % 1 == 0).all() for units in seen.values())
    before = copy.deepcopy(seen)
    model(**batch(stack, 9)).loss.backward()
    assert all(torch.equal(before[span], units) for span, units in units_of(model, "default").items())


@quiet
@pytest.mark.parametrize("stack", STACKS)
def test_units_are_those_of_the_equation(stack):
    """Root mean squares over real tokens, written out from the hidden states."""
    model = adapted(stack, torch.float64, std=0, units="stream", spans=[[0, 0], [1, 2], [3, 3]])
    x, calls = batch(stack, 3, torch.float64), {}
    layers, _ = next(iter(residuals(model)))

    def keep(layer, args, kwargs, output):
        calls[list(layers).index(layer)] = (args or [kwargs["hidden_states"]])[0], output

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    lor2c.calibrate(model, [x])
    for hook in hooks:
        hook.remove()
    for (start, end), (read, write) in units_of(model, "default").items():
        h, x_end, y = calls[start][0], calls[end][0], calls[end][1]
        h, x_end, y = ((t[0] if isinstance(t, tuple) else t) for t in (h, x_end, y))
        if "attention_mask" in x and h.shape[:2] == x["attention_mask"].shape:
            h, x_end, y = (t[x["attention_mask"] == 1] for t in (h, x_end, y))
        h, x_end, y = (t.reshape(-1, t.shape[-1]) for t in (h, x_end, y))
        size = lambda t, by: (t / by.square().mean(-1, keepdim=True).sqrt()).square().mean(0).sqrt()  # noqa: E731
        for unit, want in ((read, size(h, h)), (write, size(y - x_end, y))):
            want = want.clamp_min(0.05 * want.median())
            assert ((unit / want).log2().abs() <= 0.5 + 1e-6).all()


@pytest.mark.parametrize("stack", STACKS)
def test_who_is_warned(stack):
    model = adapted(stack, std=0, units="stream")
    if stack in POST_NORM:
        with pytest.warns(UserWarning, match="post-norm"):
            lor2c.calibrate(model, [batch(stack)])
    else:
        lor2c.calibrate(model, [batch(stack)])


def test_a_plain_pair_does_the_same():
    model, x = measured(), batch("Llama", dtype=torch.float64)
    twin = plain_twin(model)
    torch.testing.assert_close(model(**x).logits, twin(**x).logits, rtol=0, atol=1e-9)
    model(**x).loss.backward(), twin(**x).loss.backward()
    for span, (A, B) in pairs_of(model, "default").items():
        (read, write), (A_plain, B_plain) = units_of(model, "default")[span].double(), pairs_of(twin, "default")[span]
        torch.testing.assert_close(A.grad, A_plain.grad / read)  # A acts as A / D_in
        torch.testing.assert_close(B.grad, B_plain.grad * write[:, None])


def test_the_equation_written_out():
    """delta = scaling * D_out B A D_in^-1 h, next to the plain layers of the model."""
    model, x = measured(spans=[[0, 0], [1, 3]]), batch("Llama", dtype=torch.float64)
    layers, _ = next(iter(residuals(model)))
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True) for layer in layers]
    want = model(**x, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    pairs = {}
    for span, (A, B) in pairs_of(model, "default").items():
        read, write = units_of(model, "default")[span].double()
        pairs[span] = (torch.diag(1 / read) @ A.T).T, torch.diag(write) @ B, 2.0
    with torch.no_grad(), model.disable_adapter():
        h, seen = calls[0][0][0], list(calls)
        states = written_out(h, lambda t, h: layers[t](h, *seen[t][0][1:], **seen[t][1]), 4, pairs)
    torch.testing.assert_close(states[3], want[3], rtol=0, atol=1e-9)


def test_as_in_the_paper_is_the_default_to_the_bit():
    model = adapted("Llama")
    assert model.peft_config["default"].units == "paper" and not units_of(model, "default")
    assert not any("units" in key or "measured" in key for key in model.state_dict())
    x, hidden = batch("Llama"), {}
    layers, residual = next(iter(residuals(model)))
    layers[0].register_forward_hook(lambda m, a, o: hidden.update(x=a[0], y=o))
    residual_in = residual.register_forward_pre_hook(lambda m, a: hidden.update(h=a[0]))
    model(**x)
    residual_in.remove()
    A, B = pairs_of(model, "default")[0, 0]
    h = hidden["h"]
    want = torch.addmm(h.view(-1, 16), (hidden["x"] @ A.T).view(-1, 2), B.T, alpha=2.0).view_as(h)
    assert torch.equal(hidden["y"], want)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("how", ["inference", "trained", "inference, low memory", "trained, low memory", "transformers"])
def test_saved_and_loaded_to_the_bit(tmp_path, how, share):
    """The file holds a plain adapter, so that every loader has the function; what is trained on has its units again."""
    model = measured(dtype=torch.float32, share=share)
    model.base_model.set_layout(model.base_model.layout())
    x = batch("Llama")
    want = model(**x).logits
    model.save_pretrained(tmp_path)
    if how == "transformers":
        again = build("Llama")
        again.load_adapter(str(tmp_path))
    else:
        again = peft.PeftModel.from_pretrained(
            build("Llama"), tmp_path, is_trainable="trained" in how, low_cpu_mem_usage="low" in how
        )
    assert torch.equal(again(**x).logits, want)
    back = units_of(again, "default")
    assert back.keys() == (units_of(model, "default").keys() if "trained" in how else set())
    assert all(torch.equal(units, units_of(model, "default")[span]) for span, units in back.items())
    if "trained" in how:
        pairs = zip(pairs_of(model, "default").values(), pairs_of(again, "default").values(), strict=True)
        assert all(torch.equal(p, q) for old, new in pairs for p, q in zip(old, new, strict=True))


def test_a_plain_adapter_trained_on_in_units(tmp_path):
    """Units are measured late, and the function stays."""
    plain = adapted("Llama", std=0.05)
    plain.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.units, config.inference_mode = "stream", False
    model = peft.PeftModel.from_pretrained(build("Llama"), tmp_path, config=config, is_trainable=True)
    x = batch("Llama")
    torch.testing.assert_close(model(**x).logits, plain(**x).logits)
    assert all((units != 1).any() for units in units_of(model, "default").values())


def test_a_merge_takes_the_units_of_both_ends():
    model = measured(spans=None)
    was = units_of(model, "default")
    lor2c.merge_modules(model, 1, 2)
    now = units_of(model, "default")
    assert torch.equal(now[1, 2][0], was[1, 1][0]) and torch.equal(now[1, 2][1], was[2, 2][1])
    lor2c.inject_lora(model, 3)
    assert units_of(model, "default").keys() == {(0, 0), (1, 2)}


def test_a_fresh_residual_is_measured_by_the_next_batch():
    model = measured(spans=[[0, 0], [1, 1]])
    was = copy.deepcopy(units_of(model, "default"))
    model.base_model.set_layout(Layout(4, ((0, 0), (1, 1), (3, 3))))
    assert (units_of(model, "default")[3, 3] == 1).all()
    model(**batch("Llama", dtype=torch.float64))
    now = units_of(model, "default")
    assert (now[3, 3] != 1).any() and all(torch.equal(now[span], was[span]) for span in was)


def test_one_unit_to_read_in_for_a_shared_A():
    units = units_of(measured(share=True), "default").values()
    assert len({tuple(read.tolist()) for read, _ in units}) == 1 and len({tuple(w.tolist()) for _, w in units}) == 2


def test_activation_checkpointing_and_compile():
    model, x = measured(dtype=torch.float32), batch("Llama")
    model(**x).loss.backward()
    want = [p.grad.clone() for pair in pairs_of(model, "default").values() for p in pair]
    for change in ("checkpointing", "compiled"):
        other = copy.deepcopy(model)
        other.zero_grad()
        if change == "checkpointing":
            other.gradient_checkpointing_enable()
            other.train()
        run = torch.compile(other, backend="eager") if change == "compiled" else other
        run(**x).loss.backward()
        for p, q in zip((p for pair in pairs_of(other, "default").values() for p in pair), want, strict=True):
            torch.testing.assert_close(p.grad, q)


def test_measured_under_compile_and_in_a_trainer(tmp_path):
    compiled = adapted("Llama", std=0, units="stream")
    torch.compile(compiled, backend="eager")(**batch("Llama")).loss.backward()
    assert all((units != 1).any() for units in units_of(compiled, "default").values())
    model = adapted("Llama", std=0, units="stream")
    rows = Dataset.from_list([dict(input_ids=list(range(3, 15)), labels=list(range(3, 15)))] * 8)
    args = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model, args, train_dataset=rows).train()
    assert all((units != 1).any() for units in units_of(model, "default").values())


def test_what_is_refused():
    with pytest.raises(ValueError, match="unknown units 'metres': choose one of paper, stream"):
        lor2c.LoR2CConfig(units="metres")
    model = adapted("Llama", std=0, units="stream")
    with pytest.raises(ValueError, match="found none: pass batches"):
        lor2c.calibrate(model, [])
    model.get_input_embeddings().weight.data[5] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        lor2c.calibrate(model, [dict(input_ids=torch.tensor([[5, 6]]))])
    assert all((units == 1).all() for units in units_of(model, "default").values())
    with pytest.raises(ValueError, match="has no units to measure: make it with"):
        lor2c.calibrate(adapted("Llama"), [batch("Llama")])


def test_a_checkpoint_folds_nothing_that_was_not_measured():
    model = adapted("Llama", std=0, units="stream")
    state = {key: value for key, value in model.state_dict().items() if "lor2c" in key}
    assert not any("measured" in key for key in folded(state)) and len(folded(state)) == len(state) - 2
