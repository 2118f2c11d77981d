"""A merge and an injection on a live model: what is trained afterwards, by which optimizer, and with which gradients."""

import copy
import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import STACKS, adapted, batch, build, gradients, layers_path, task_type, written_out

import lor2c
from lor2c.maths.layout import Layout
from lor2c.training.optimizer import inner_optimizer, sync_optimizer
from lor2c.training.scores import scores_of
from lor2c.training.surgery import inject_lora, merge_modules
from lor2c.training.wrappers import tuner_of
from lor2c.tuners.residual import LoR2CLayer

ONE_LAYER = [[t, t] for t in range(4)]


def named(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, optimizer, b, steps, schedule=None):
    model.train()
    for _ in range(steps):
        loss = model(**b).loss
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
    return loss.item()


def start(stack="Llama", r=4, **config):
    model = adapted(stack, std=0, spans=ONE_LAYER, r=r, **config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer


@pytest.mark.parametrize("share", [False, True], ids=["own A", "shared A"])
@pytest.mark.parametrize("stack", STACKS)
def test_every_parameter_of_the_new_structure_learns(stack, share):
    """After a merge and after an injection, each trained tensor has changed within ten steps."""
    model, optimizer = start(stack, share=share)
    b = batch(stack)
    train(model, optimizer, b, 3)
    for move in (
        lambda: merge_modules(model, 1, 2, optimizer=optimizer),
        lambda: inject_lora(model, 0, optimizer=optimizer),
    ):
        change = move()
        before = {name: p.detach().clone() for name, p in named(model).items()}
        train(model, optimizer, b, 10)
        assert [name for name, p in named(model).items() if torch.equal(p, before[name])] == [], change.move
    assert tuner_of(model).layout() == Layout(4, ((1, 2), (3, 3)), ((0, 2, 4),))
    assert any("lora_A" in name for name in before) and any("lora_B" in name for name in before)


def test_an_optimizer_that_is_not_told_trains_nothing_new():
    """The check above can fail: without `optimizer=` the injected LoRA stays as it was."""
    model, optimizer = start()
    inject_lora(model, 0)
    before = {name: p.detach().clone() for name, p in named(model).items() if "lora_" in name}
    train(model, optimizer, batch("Llama"), 10)
    assert before and all(torch.equal(named(model)[name], p) for name, p in before.items())


def grouped(model):
    """Two groups for A and B, as LoRA+ has them, and a learning rate schedule."""
    down = [p for name, p in named(model).items() if "_A" in name]
    up = [p for name, p in named(model).items() if "_B" in name]
    optimizer = torch.optim.AdamW([dict(params=down, lr=1e-2), dict(params=up, lr=4e-2, weight_decay=0.3)])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize("keep", ["first", "second"])
def test_optimizer_after_a_merge(keep):
    """Same groups, the trained parameters in the model's order, the survivor's Adam state; the schedule goes on."""
    model, b = adapted("Llama", std=0, spans=ONE_LAYER, r=4), batch("Llama")
    optimizer, schedule = grouped(model)
    train(model, optimizer, b, 3, schedule)
    layers = model.base_model.model.model.layers
    host = layers[1 if keep == "first" else 2].lor2c
    kept = [host.lor2c_A["default"].weight, host.lor2c_B["default"].weight]
    moments = [copy.deepcopy(optimizer.state[p]) for p in kept]
    rates = [group["lr"] for group in optimizer.param_groups]

    change = merge_modules(model, 1, 2, keep=keep, optimizer=optimizer)
    assert change.layout.spans == ((0, 0), (1, 2), (3, 3)) and change.kept.startswith(keep)
    assert change.parameters == (4 * 2 * 16 * 4, 3 * 2 * 16 * 4)  # 2 d r fewer
    now = layers[2].lor2c
    assert [now.lor2c_A["default"].weight, now.lor2c_B["default"].weight] == kept  # the very same parameters
    for p, before in zip(kept, moments, strict=True):
        assert all(torch.equal(optimizer.state[p][key], before[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    check_optimizer(model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    train(model, optimizer, b, 2, schedule)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2 / 6, 4e-2 / 6])


def check_optimizer(model, optimizer):
    """Exactly the trained parameters: A's in the first group, B's in the second, in model order, and no state of others."""
    first, second = (group["params"] for group in optimizer.param_groups)
    assert [id(p) for p in first] == [id(p) for name, p in named(model).items() if "_A" in name]
    assert [id(p) for p in second] == [id(p) for name, p in named(model).items() if "_B" in name]
    assert set(optimizer.state) <= {*first, *second}


def test_optimizer_after_an_injection():
    model, b = adapted("GPT-2", std=0, spans=ONE_LAYER, r=4), batch("GPT-2")
    optimizer, schedule = grouped(model)
    train(model, optimizer, b, 2, schedule)
    change = inject_lora(model, 2, optimizer=optimizer)
    check_optimizer(model, optimizer)
    assert change.layout.injected == ((2, 2, 4),) and change.parameters == (512, 512)
    state = optimizer.state_dict()
    assert len(state["state"]) == 6  # three residuals are left; the new LoRA has no history yet
    train(model, optimizer, b, 1, schedule)
    assert len(optimizer.state_dict()["state"]) == 6 + 3  # one A for q and v side by side, B of q, B of v


def test_optimizer_of_some_parameters_gets_no_others():
    """A head with an optimizer of its own stays out of the adapter's."""
    model = adapted("BERT", std=0, spans=ONE_LAYER, r=4)
    adapter = [p for name, p in named(model).items() if "lor2c" in name]
    optimizer = torch.optim.SGD(adapter, lr=0.1)
    inject_lora(model, 3, optimizer=optimizer)
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert mine == {id(p) for name, p in named(model).items() if "lor2c" in name or "lora_" in name}


def test_what_else_an_optimizer_holds_stays_in_it():
    """The frozen base, another network, another adapter, and state that belongs to no parameter."""
    model = adapted("Llama", std=0, spans=ONE_LAYER, r=4)
    model.add_adapter("other", lor2c.LoR2CConfig(r=2, dropout=0.0))
    head = torch.nn.Linear(2, 2)
    everything = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(everything, lr=1e-2)
    optimizer.state["k"] = {"step": 3}
    train(model, optimizer, batch("Llama"), 2)
    before = set(everything)
    merge_modules(model, 0, 1, optimizer=optimizer)
    inject_lora(model, 3, optimizer=optimizer)
    held = optimizer.param_groups[0]["params"]
    assert len(before - set(held)) == 4 and before - set(held) <= before - set(model.parameters())  # two pairs are gone
    assert [id(p) for p in held] == [id(p) for p in [*model.parameters(), *head.parameters()]]
    assert optimizer.state["k"] == {"step": 3} and not set(optimizer.state) - {"k"} - set(held)


def test_an_optimizer_that_knows_names_knows_the_new_ones():
    """torch lets an optimizer be made from named parameters; loading by name would else take another's moments."""
    model, head = adapted("Llama", std=0, spans=ONE_LAYER, r=4), torch.nn.Linear(2, 2)
    own = [("head.weight", head.weight), *named(model).items()]
    optimizer = torch.optim.AdamW(own, lr=1e-2)
    train(model, optimizer, batch("Llama"), 2)
    merge_modules(model, 1, 2, optimizer=optimizer)
    inject_lora(model, 0, optimizer=optimizer)
    [group] = optimizer.state_dict()["param_groups"]
    assert group["param_names"] == [*named(model), "head.weight"]


def test_a_group_for_each_layer():
    """Layer-wise rates: what comes into a layer joins that layer's group, as a fresh process would have it."""

    def groups(model):
        found = {}
        for name, p in named(model).items():
            found.setdefault(int(name.split("layers.")[1].split(".")[0]), []).append(p)
        return [dict(params=found.get(layer, []), lr=10.0 ** -(4 - layer)) for layer in range(4)]

    model, b = adapted("Llama", std=0, spans=ONE_LAYER, r=4), batch("Llama")
    optimizer = torch.optim.AdamW(groups(model))
    train(model, optimizer, b, 2)
    merge_modules(model, 0, 1, keep="first", optimizer=optimizer)
    inject_lora(model, 3, optimizer=optimizer)
    fresh = torch.optim.AdamW([group for group in groups(model)])
    for mine, theirs in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert mine["lr"] == theirs["lr"] and list(map(id, mine["params"])) == list(map(id, theirs["params"]))
    fresh.load_state_dict(optimizer.state_dict())


def test_what_is_frozen_stays_frozen():
    """A residual that its user has frozen freezes no other, and stays so through a merge; another adapter's LoRA too."""
    model = adapted("Llama", std=0, spans=ONE_LAYER, r=4)
    first = model.base_model.model.model.layers[0].lor2c
    kept = first.lor2c_A["default"].weight
    for p in first.parameters():
        p.requires_grad_(False)
    inject_lora(model, 3)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    merge_modules(model, 0, 1, keep="first")
    pair = model.base_model.model.model.layers[1].lor2c
    assert pair.lor2c_A["default"].weight is kept
    assert not pair.lor2c_A["default"].weight.requires_grad and not pair.lor2c_B["default"].weight.requires_grad
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.requires_grad_(False)
    model.add_adapter("two", lor2c.LoR2CConfig(r=4, dropout=0.0))
    inject_lora(model, 3, adapter_name="two")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name and "default" in name)


class Odd(torch.nn.Module):
    """Looks like a linear map, and is none that PEFT knows."""

    def __init__(self, like: torch.nn.Linear) -> None:
        super().__init__()
        self.inner, self.in_features, self.out_features = like, like.in_features, like.out_features

    def forward(self, x):
        return self.inner(x)


def test_what_peft_refuses_changes_nothing():
    """A value projection of an unknown kind: the residual stays, and q gets no LoRA of its own."""
    model, optimizer = start()
    attention = model.base_model.model.model.layers[1].self_attn
    attention.v_proj = Odd(attention.v_proj)
    before, held = tuner_of(model).layout(), list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match="not supported"):
        inject_lora(model, 1, optimizer=optimizer)
    assert tuner_of(model).layout() == before and list(map(id, optimizer.param_groups[0]["params"])) == list(
        map(id, held)
    )
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert model.peft_config["default"].injected is None
    train(model, optimizer, batch("Llama"), 1)


def test_wrapped_optimizers_are_found():
    from accelerate import Accelerator

    model, optimizer = start()
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert inner_optimizer(wrapped) is optimizer
    merge_modules(model, 0, 1, optimizer=wrapped)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named(model))
    with pytest.raises(TypeError, match="torch.optim.Optimizer is needed, found dict"):
        sync_optimizer({}, model, {})


def test_a_merge_keeps_the_pair_with_more_information():
    """And reads where the first did, adds where the second did: the equation, written out."""
    model, b = adapted("Llama", spans=ONE_LAYER, r=4, dtype=torch.float64), batch("Llama", dtype=torch.float64)
    scores = scores_of(model)
    richer = max((1, 2), key=scores.__getitem__)
    layers = model.base_model.model.model.layers
    want = layers[richer].lor2c.lor2c_A["default"].weight, layers[richer].lor2c.lor2c_B["default"].weight
    change = merge_modules(model, 1, 2)
    module = layers[2].lor2c
    assert change.kept.split()[0] == ("first" if richer == 1 else "second")
    assert (module.lor2c_A["default"].weight, module.lor2c_B["default"].weight) == want and module.start == {
        "default": 1
    }
    assert sorted(scores_of(model)) == [0, 1, 3] and scores_of(model)[1] == pytest.approx(scores[richer])
    states = model(**b, output_hidden_states=True).hidden_states
    with torch.no_grad(), model.disable_adapter():
        body = build("Llama", torch.float64)
        pair = {(1, 2): (want[0].double(), want[1].double(), module.scaling["default"])}
        angles = body.model.rotary_emb(states[1], torch.arange(12)[None])
        run = lambda t, h: body.model.layers[t + 1](h, attention_mask=None, position_embeddings=angles)  # noqa: E731
        expected = written_out(states[1], run, 2, {(0, 1): pair[1, 2]})[-1]
    torch.testing.assert_close(states[3], expected)


@pytest.mark.parametrize("stack", ["BERT", "Llama", "GPT-2", "T5 decoder"])
def test_checkpointing_two_forwards_and_a_span_of_three(stack):
    """Two forwards before one backward, dropout off, float64: gradients equal those without checkpointing to 1e-12."""

    def run(checkpointing):
        model = adapted(stack, torch.float64, spans=[[0, 0], [1, 1], [2, 2], [3, 3]], r=4)
        for p in named(model).values():
            p.data = p.data.double()
        merge_modules(model, 1, 2)
        merge_modules(model, 1, 3)
        inject_lora(model, 0)
        generator = torch.Generator().manual_seed(5)
        for name, p in named(model).items():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 10
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        losses = [model(**batch(stack, seed, torch.float64)).loss for seed in (1, 2)]
        sum(losses).backward()
        return model, gradients(model)

    (plain, want), (checkpointed, got) = run(False), run(True)
    assert tuner_of(plain).layout() == Layout(4, ((1, 3),), ((0, 2, 4),))
    assert checkpointed.base_model.model.is_gradient_checkpointing
    assert want.keys() == got.keys() and any("lora_B" in name for name in want)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-12)
    assert max(gradient.abs().max() for gradient in want.values()) > 1e-3


READ = """
import sys, torch, warnings
sys.path.insert(0, sys.argv[1]); warnings.simplefilter("ignore")
from peft import PeftModel
from tiny import batch, build
import lor2c
model = PeftModel.from_pretrained(build(sys.argv[2]), sys.argv[3]).eval()
torch.save((model(**batch(sys.argv[2])).logits, str(model.base_model.layout())), sys.argv[4])
"""


@pytest.mark.parametrize("stack", ["Llama", "GPT-2"])
def test_a_fresh_process_reads_the_same_structure(stack, tmp_path, request):
    """Merged, injected, saved; another process gives bitwise the same logits."""
    model, optimizer = start(stack, share=stack == "Llama")
    train(model, optimizer, batch(stack), 2)
    merge_modules(model, 0, 1, optimizer=optimizer)
    inject_lora(model, 3, optimizer=optimizer)
    train(model, optimizer, batch(stack), 2)
    model.eval().save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-c", READ, request.path.parents[1], stack, tmp_path / "adapter", tmp_path / "out.pt"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logits, layout = torch.load(tmp_path / "out.pt")
    assert layout == "[0..1] [2] LoRA@3" and torch.equal(logits, model(**batch(stack)).logits)


def test_what_cannot_be_done_changes_nothing():
    """Every refusal says what is wrong, and the model is as it was."""
    model, optimizer = start()
    b, want = batch("Llama"), model.eval()(**batch("Llama")).logits
    merged, plain = copy.deepcopy(model), build("Llama").parameters()
    merge_modules(merged, 0, 1)
    for attempt, message in [
        (lambda: merge_modules(model, 0, 2), r"\[0..0\] and \[2..2\] are not neighbours"),
        (lambda: merge_modules(model, 1, 0), "not neighbours"),
        (lambda: merge_modules(model, 0, 9), "no residual begins at layer 9: they begin at 0, 1, 2, 3"),
        (
            lambda: merge_modules(model, 0, 1, keep="best"),
            "unknown keep 'best': choose one of more_information, first, second",
        ),
        (lambda: merge_modules(model, 0, 1, score="entropy"), "unknown score 'entropy'"),
        (lambda: merge_modules(model, 0, 1, k=4), "k of SFS must be a whole number from 1 to r - 1 = 3, found 4"),
        (lambda: inject_lora(model, 7), "no residual begins at layer 7"),
        (lambda: inject_lora(merged, 0), r"residual \[0..1\] is merged"),
        (lambda: inject_lora(model, 0, r=0), "rank of injected LoRA must be a whole number of at least 1, found 0"),
        (lambda: inject_lora(model, 0, r=2.0), "rank of injected LoRA must be a whole number of at least 1, found 2.0"),
        (lambda: inject_lora(model, 0, alpha=0), "alpha of injected LoRA must be above 0"),
        (
            lambda: inject_lora(model, 0, optimizer=torch.optim.SGD(plain, lr=1)),
            "the optimizer lacks 8 of the adapter's 8",
        ),
        (lambda: merge_modules(model, 0, 1, adapter_name="other"), "no LoR2C adapter 'other'"),
    ]:
        with pytest.raises(ValueError, match=message):
            attempt()
    for thing in (build("Llama"), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="a LoR2C model is needed"):
            merge_modules(thing, 0, 1)
    assert torch.equal(model(**b).logits, want) and len(optimizer.param_groups[0]["params"]) == 8


def test_moves_on_one_adapter_leave_another_alone():
    model, b = adapted("Llama", spans=ONE_LAYER, r=4), batch("Llama")
    model.add_adapter("other", lor2c.LoR2CConfig(r=2, spans=[[0, 3]], dropout=0.0))
    model.set_adapter("other")
    for module in model.modules():
        if isinstance(module, LoR2CLayer) and "other" in module.lor2c_B:
            torch.nn.init.normal_(module.lor2c_B["other"].weight)
    want = model(**b).logits
    model.set_adapter("default")
    merge_modules(model, 2, 3)
    inject_lora(model, 0)
    model.set_adapter("other")
    assert torch.equal(model(**b).logits, want)
    model.delete_adapter("default")
    assert torch.equal(model(**b).logits, want) and not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("order", list(itertools.permutations(["merge", "inject"])), ids="-then-".join)
def test_there_and_back(order, tmp_path):
    """A model that has changed takes an earlier checkpoint back, with its layout, and the other way round."""
    model, _ = start()
    folders = []
    for i, move in enumerate(["none", *order]):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            {
                "none": lambda: None,
                "merge": lambda: merge_modules(model, 1, 2),
                "inject": lambda: inject_lora(model, 3),
            }[move]()
        torch.manual_seed(i)
        for p in named(model).values():
            p.data.normal_(std=0.1)
        folders.append((tmp_path / str(i), tuner_of(model).layout(), model(**batch("Llama")).logits.detach()))
        model.save_pretrained(folders[-1][0])
    for folder, layout, logits in [*reversed(folders), *folders]:
        model.load_adapter(folder, "default", is_trainable=True)
        assert tuner_of(model).layout() == layout and torch.equal(model.eval()(**batch("Llama")).logits, logits)
        assert all(p.requires_grad for name, p in model.named_parameters() if "lor2c_" in name or "lora_" in name)
    again = PeftModel.from_pretrained(build("Llama"), folder).eval()
    assert torch.equal(again(**batch("Llama")).logits, logits)


def test_a_structure_from_a_configuration():
    """Spans and injected LoRA can be asked for from the start."""
    for stack in ("BERT", "GPT-2"):
        config = lor2c.LoR2CConfig(
            r=4, spans=[[1, 2]], injected={0: [2, 8]}, task_type=task_type(stack), layers=layers_path(stack)
        )
        model = get_peft_model(build(stack), config)
        assert tuner_of(model).layout() == Layout(4, ((1, 2),), ((0, 2, 8),))
        model(**batch(stack)).loss.backward()
        rest = get_peft_model(build(stack), lor2c.LoR2CConfig(r=4, injected={0: [2, 8]}, task_type=task_type(stack)))
        assert tuner_of(rest).layout().spans == ((1, 1), (2, 2), (3, 3))  # no span around what is injected


@pytest.mark.parametrize("keep", ["first", "second", "more_information", "fitted"])
def test_residuals_with_ranks_of_their_own(keep):
    """They are scored beside the others, they merge and give way, and a callback goes on after it has shrunk the adapter."""
    model = adapted("Llama", r=4, spans=ONE_LAYER, ranks={1: 1, 2: 2})
    scores = scores_of(model)
    assert list(scores) == [0, 1, 2, 3] and scores[1] == scores[2] == 0 < min(scores[0], scores[3])
    b = batch("Llama")
    rows = [{**b, "labels": b["input_ids"]}]
    merged = merge_modules(model, 1, 2, keep=keep, batches=rows if keep == "fitted" else None)
    assert str(merged.layout).startswith("[0] [1..2]:")
    inject_lora(model, 3)
    assert model(**b).logits.isfinite().all() and list(scores_of(model)) == [0, 1]


def test_entries_after_a_shrinking():
    """Epochs that end after the ranks have fallen are written down like those before."""
    model, b = adapted("Llama", r=4), batch("Llama")
    rows = [{**b, "labels": b["input_ids"]}]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    changes = lor2c.IMCallback(budget=0.5)
    changes.begin(model, 8, 2, optimizer, batches=rows)
    for step in range(8):
        model(**rows[0]).loss.backward()
        changes.before_step(model)
        optimizer.step()
        optimizer.zero_grad()
        changes.after_step(model, optimizer)
        if step == 3:  # Adam's next step must not be large beside the numbers that it changes
            lowered = [p.norm(dim=1) for n, p in named(model).items() if "lor2c_A" in n and len(p) < 4]
            torch.testing.assert_close(torch.cat(lowered), torch.full((sum(map(len, lowered)),), 3**-0.5))
    changes.finish()
    moves = [entry["move"] and entry["move"]["kind"] for entry in changes.history]
    assert moves == [None, "shrink", None, None] and len({rank for _, rank in changes.history[-1]["ranks"]}) > 0
    assert changes.history[-1]["parameters"] == changes.history[0]["parameters"] // 2
