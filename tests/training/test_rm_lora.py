"""RM-LoRA: Eq. 10 and Algorithm 1 beside written-out references, in Trainers, loops, several processes, resumed."""

import copy
import json
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from tiny import BUILD, DECODER, batch, build, task_type, words_and_rows
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import lor2c
from lor2c.maths.orthogonality import measure_pair, orthogonality, orthogonality_gradient
from lor2c.training import decisions, masks, wrappers
from lor2c.training.imlor2c import IMCallback
from lor2c.training.low_rank_pairs import low_rank_pairs
from lor2c.training.masks import RMSettings, add_regulariser, draw_directions
from lor2c.training.rm_lora import RMLoRACallback

WORKER = Path(__file__).parents[1] / "workers" / "regularised.py"


def of_lora(name: str) -> bool:
    return "lora_" in name or "lor2c_" in name


def spread(model, seed: int = 0):
    """Every trained number anew, so that no B is zero."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) / 3
    return model


class Layers(nn.Module):
    """What PEFT's LoRA can be on besides a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(20, 6), nn.Conv2d(1, 5, 3, padding=1)
        self.line, self.head = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, ids):
        seen = self.conv(self.words(ids).unsqueeze(1)).mean(1)
        return self.head(torch.tanh(self.line(seen))).mean(1)


def lora(stack: str = "Llama", dtype=torch.float32, **config):
    base = build(stack, dtype)
    return get_peft_model(base, LoraConfig(**dict(r=4, lora_alpha=8, task_type=task_type(stack)) | config))


def residuals(dtype=torch.float32, stack: str = "Llama", **config):
    settings = dict(r=4, alpha=8, dropout=0.0, task_type=task_type(stack)) | config
    return get_peft_model(build(stack, dtype), lor2c.LoR2CConfig(**settings))


def injected(dtype=torch.float32, stack: str = "GPT-2", **config):
    """Residuals with a span of two layers, and LoRA on q and v of one; fused in GPT-2."""
    model = residuals(dtype, stack, **config)
    lor2c.merge_modules(model, 0, 1)
    lor2c.inject_lora(model, 3)
    return model


DOUBLE = torch.float64
MODELS = {
    "LoRA": lambda: lora(dtype=DOUBLE, use_rslora=True),
    "layers": lambda: get_peft_model(
        Layers().double(), LoraConfig(r=3, target_modules=["words", "conv", "line"], modules_to_save=["head"])
    ),
    "residuals": lambda: residuals(DOUBLE),
    "shared A": lambda: residuals(DOUBLE, share=True),
    "injected": lambda: injected(DOUBLE, "Llama"),
    "fused": lambda: injected(DOUBLE),
    "ResLoRA": lambda: get_peft_model(
        build("Llama", DOUBLE), lor2c.ResLoRAConfig(r=4, target_modules=["q_proj", "v_proj"])
    ),
}
COUNT = {"LoRA": 8, "ResLoRA": 8, "layers": 3, "residuals": 4, "shared A": 4, "injected": 4, "fused": 4}


def matrices(model) -> list[torch.Tensor]:
    """Every A as (r, d) and every B as (r, d), found by the names of parameters alone."""
    found = []
    for name, p in model.named_parameters():
        if re.search(r"lor2c_A|lora_A|embedding_A", name):
            fused = "c_attn" in name
            found += list(p.flatten(1).chunk(2)) if fused else [p.flatten(1)]
        elif re.search(r"lor2c_B|lora_B|embedding_B", name):
            found.append(p.flatten(1).T)
    return found


# Values


@pytest.mark.parametrize("squared", [True, False])
def test_values_and_gradients_are_eq_10(squared):
    """Written out number by number, and autograd's."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(3, 7, generator=g, dtype=DOUBLE, requires_grad=True)
    B = torch.randn(5, 3, generator=g, dtype=DOUBLE, requires_grad=True)
    parts = []
    for rows in (A.tolist(), B.T.tolist()):
        products = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
        parts.append(sum((products[i][j] - (i == j)) ** 2 for i in range(3) for j in range(3)))
    want = sum(parts) if squared else sum(part**0.5 for part in parts)
    value = orthogonality(A, B, squared)
    assert value.item() == pytest.approx(want, abs=1e-9)
    for mine, theirs in zip(orthogonality_gradient(A, B, squared), torch.autograd.grad(value, (A, B)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=DOUBLE)).Q
    eye = torch.eye(4, 6, dtype=DOUBLE)
    assert orthogonality(Q[:3], Q[:, :3], squared) < 1e-12
    for grad in orthogonality_gradient(eye, eye.T, squared):  # where the norm is zero, so is the gradient
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("how", [{}, dict(squared=False), dict(squared=False, reduction="mean")], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_every_pair_gets_its_gradient_and_nothing_else_does(kind, how):
    # checks: RM-LoRA Eq. 10
    model = spread(MODELS[kind]())
    pairs = low_rank_pairs(model)
    assert len(pairs) == COUNT[kind]
    found = matrices(model)
    assert len(found) == 2 * COUNT[kind] - 3 * (kind == "shared A")
    norms = torch.stack([torch.linalg.matrix_norm(X @ X.T - torch.eye(len(X), dtype=DOUBLE)) for X in found])
    norms = norms if "squared" in how else norms**2
    (0.3 * (norms.mean() if "reduction" in how else norms.sum())).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    add_regulariser(pairs.values(), RMSettings(0.3, **how))
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = torch.zeros_like(p) if want[name] is None else want[name]
            torch.testing.assert_close(p.grad, expected, atol=1e-9, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            assert of_lora(name) == bool(p.grad.any())


def test_what_is_measured_is_the_dense_product():
    for kind in MODELS:
        for pair in low_rank_pairs(spread(MODELS[kind]())).values():
            A, B = pair.A.rows(), pair.B.rows().T
            W = B @ A
            found = measure_pair(A, B)
            dense = torch.linalg.matrix_norm(W @ W.T - torch.eye(len(W), dtype=DOUBLE)) ** 2
            assert found["orthogonality"] == pytest.approx(dense.item(), rel=1e-9)
            assert found["rank"] == torch.linalg.matrix_rank(W) == pair.A.r
            assert found["regulariser"] == pytest.approx(orthogonality(A, B).item(), rel=1e-9)
            json.dumps(found)
    A, B = torch.eye(4, 9, dtype=DOUBLE), torch.diag(torch.tensor([1, 1e-1, 1e-3, 0.0], dtype=DOUBLE))
    assert [measure_pair(A, B, rtol=t)["rank"] for t in (None, 1e-2, 0.5)] == [3, 2, 1]
    assert measure_pair(A, torch.zeros(9, 4, dtype=DOUBLE))["rank"] == 0
    wide = torch.randn(6, 4, dtype=DOUBLE), torch.randn(3, 6, dtype=DOUBLE)  # the rank above both widths
    W = wide[1] @ wide[0]
    dense = torch.linalg.matrix_norm(W @ W.T - torch.eye(3, dtype=DOUBLE)).item() ** 2
    assert measure_pair(*wide)["orthogonality"] == pytest.approx(dense, rel=1e-9)
    with pytest.raises(FloatingPointError, match="not finite: training diverged"):
        measure_pair(A, torch.full((9, 4), float("nan"), dtype=DOUBLE))


def test_only_what_is_active_and_trained():
    model = lora(modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert {pair.A.r for pair in low_rank_pairs(model).values()} == {4}
    model.set_adapter("other")
    for p in model.parameters():
        p.requires_grad_()
    assert {(name.rpartition(".")[2], pair.A.r) for name, pair in low_rank_pairs(model).items()} == {("other", 2)}
    model = lora()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name and "layers.1" in name)  # as where A is frozen
    pairs = low_rank_pairs(model)
    assert len(pairs) == 2
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    add_regulariser(pairs.values(), RMSettings(1.0))
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)
    with model.disable_adapter():
        assert low_rank_pairs(model) == {}
    compiled = torch.compile(lora(), backend="eager")
    assert low_rank_pairs(compiled).keys() == low_rank_pairs(lora()).keys()
    bare = build("Llama")
    bare.add_adapter(LoraConfig(r=4))  # transformers' own way, without a PEFT model
    assert low_rank_pairs(bare).keys() == low_rank_pairs(lora()).keys()


# Algorithm 1


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def two_layers():
    set_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["one", "two"], modules_to_save=["head"])
    return spread(get_peft_model(Two().double(), config))


@pytest.mark.parametrize("share", [True, False])
def test_five_steps_are_algorithm_1(share):
    """Its text, with plain SGD as in line 14, beside the hooks."""
    # checks: RM-LoRA Algorithm 1
    rate, coefficient, seed, k = 0.05, 0.02, 5, 2
    g = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(8, 6, generator=g, dtype=DOUBLE), torch.randn(8, 1, generator=g, dtype=DOUBLE)) for _ in range(5)
    ]

    model = two_layers()
    values = dict(model.named_parameters())
    W = {n: values[f"base_model.model.{n}.base_layer.weight"].clone() for n in ("one", "two")}
    A = {n: values[f"base_model.model.{n}.lora_A.default.weight"].detach().clone() for n in W}
    B = {n: values[f"base_model.model.{n}.lora_B.default.weight"].detach().clone() for n in W}
    head, bias = (
        values[f"base_model.model.head.modules_to_save.default.{n}"].detach().clone() for n in ("weight", "bias")
    )
    for t, (x, y) in enumerate(data):
        free = [*A.values(), *B.values(), head, bias]
        for one in free:
            one.requires_grad_()
        h = x
        for n in W:
            h = torch.tanh(h @ (W[n] + B[n] @ A[n]).T)
        loss = (h @ head.T + bias - y).square().mean()
        for n in W:
            eye = torch.eye(4, dtype=DOUBLE)
            loss = loss + coefficient * ((A[n] @ A[n].T - eye).square().sum() + (B[n].T @ B[n] - eye).square().sum())
        gradients = dict(zip(map(id, free), torch.autograd.grad(loss, free), strict=True))
        with torch.no_grad():
            for n in W:
                rows = random.Random(f"{seed} {t} {n}.default").sample(range(4), k)
                columns = rows if share else random.Random(f"{seed} {t} {n}.default B").sample(range(4), k)
                M_A, M_B = torch.zeros(A[n].shape, dtype=DOUBLE), torch.zeros(B[n].shape, dtype=DOUBLE)
                M_A[rows, :], M_B[:, columns] = 1, 1
                A[n], B[n] = A[n] - rate * gradients[id(A[n])] * M_A, B[n] - rate * gradients[id(B[n])] * M_B
            head, bias = head - rate * gradients[id(head)], bias - rate * gradients[id(bias)]

    callback = RMLoRACallback(coefficient, k, share_directions=share, seed=seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    callback.begin(model, optimizer)
    for x, y in data:
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    callback.finish()
    for n in W:
        torch.testing.assert_close(
            values[f"base_model.model.{n}.lora_A.default.weight"].detach(), A[n], atol=1e-9, rtol=0
        )
        torch.testing.assert_close(
            values[f"base_model.model.{n}.lora_B.default.weight"].detach(), B[n], atol=1e-9, rtol=0
        )
    mine = values["base_model.model.head.modules_to_save.default.weight"].detach()
    torch.testing.assert_close(mine, head, atol=1e-9, rtol=0)


def steps(model, callback, optimizer, n: int = 4, watch=None) -> None:
    """Some steps of a loop of one's own; `watch` sees the model after each."""
    callback.begin(model, optimizer)
    for step in range(n):
        model(**batch("Llama", step)).loss.backward()
        optimizer.step()
        if watch:
            watch(step)
        optimizer.zero_grad()
    callback.finish()


@pytest.mark.parametrize("mask", ["gradient", "update"])
def test_masked_directions_under_adamw(mask):
    """Momentum and decay move them where only the gradient is masked; mask='update' puts them back, to the bit."""
    model = spread(lora())
    pairs = low_rank_pairs(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    before = {name: (pair.A.rows().clone(), pair.B.rows().clone()) for name, pair in pairs.items()}
    moved = []

    def watch(step: int) -> None:
        for name, pair in pairs.items():
            chosen = draw_directions(0, step, name, 4, 2)
            others = [i for i in range(4) if i not in chosen]
            for then, factor in zip(before[name], (pair.A, pair.B), strict=True):
                now = factor.rows()
                grad = factor.p.grad.T if factor.dim else factor.p.grad
                assert not grad[others].any() and grad[chosen].any(1).all()
                moved.append(not torch.equal(now[others], then[others]))
                assert all(not torch.equal(now[i], then[i]) for i in chosen)
            before[name] = pair.A.rows().clone(), pair.B.rows().clone()

    steps(model, RMLoRACallback(0.01, 2, mask=mask), optimizer, watch=watch)
    assert len(moved) == 4 * 16 and set(moved) == {mask == "gradient"}


def test_a_shared_A_has_one_set_of_directions():
    model = spread(residuals(share=True))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []

    def watch(step: int) -> None:
        A = next(p for name, p in model.named_parameters() if "lor2c_A" in name)
        rows = A.grad.any(1).tolist()
        columns = [p.grad.any(0).tolist() for name, p in model.named_parameters() if "lor2c_B" in name]
        assert sum(rows) == 2 and columns == [rows] * 4
        seen.append(rows)

    steps(model, RMLoRACallback(0.0), optimizer, 6, watch)
    assert len(set(map(tuple, seen))) > 1


def test_gradients_of_everything_else_are_left_alone():
    """At the first step: head, biases and layer norms have the gradients of a run without the callback, to the bit."""
    found = {}
    for name, callback in (("plain", None), ("rm", RMLoRACallback(0.01, 2)), ("r", RMLoRACallback(0.01, mask=None))):
        set_seed(0)
        model = spread(lora("BERT", bias="lora_only", modules_to_save=["classifier", "LayerNorm"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if callback:
            callback.begin(model, optimizer)
        model(**batch("BERT")).loss.backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not p.requires_grad)
        found[name] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    others = [n for n in found["plain"] if not of_lora(n)]
    assert (
        any("classifier" in n for n in others) and any("bias" in n for n in others) and any("Norm" in n for n in others)
    )
    for n, grad in found["plain"].items():
        for kind in ("rm", "r"):
            assert torch.equal(found[kind][n], grad) == (n in others), n
    for n, grad in found["r"].items():  # what is not masked is the regularised gradient
        other = found["rm"][n]
        assert n in others or torch.equal(other[other != 0], grad[other != 0])


def test_what_has_no_gradient_gets_none():
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    callback = RMLoRACallback(1.0)
    callback.begin(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with model.disable_adapter():
        optimizer.step()
    optimizer.step()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("size", [0.1, 1e3])
def test_the_norm_is_bounded_with_the_regulariser_inside(size):
    model = spread(lora(modules_to_save=["lm_head"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    norms = []

    def watch(step: int) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])).item())

    steps(model, RMLoRACallback(10.0, max_grad_norm=size), optimizer, 2, watch)
    assert norms == pytest.approx([size] * 2, rel=1e-3) if size < 1 else 1 < norms[0] < size
    model = spread(lora(modules_to_save=["lm_head"]))
    steps(
        model,
        RMLoRACallback(10.0),
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        1,
        watch,
    )
    assert norms[-1] > 1


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler(fused):
    """The regulariser is neither scaled nor lost, whether the scaler unscales or the optimizer in its step."""
    ends = []
    for scale in (None, 2.0**10):
        model = spread(lora())
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        callback = RMLoRACallback(0.5, max_grad_norm=2.0)
        callback.begin(model, optimizer)
        for step in range(3):
            scaler.scale(model(**batch("Llama", step)).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(dict(model.named_parameters()))
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, atol=1e-6, rtol=0)


def test_a_trainer_counts_steps_that_a_scaler_skipped():
    """Its own count goes on where gradients were infinite; directions are those of its count."""
    model, callback = spread(lora()), RMLoRACallback(directions=1)
    optimizer = begun(model, callback)
    callback.on_step_begin(None, SimpleNamespace(global_step=7), None)
    model(**batch("Llama")).loss.backward()
    optimizer.step()
    name, pair = next(iter(low_rank_pairs(model).items()))
    assert (
        pair.A.p.grad.any(1).nonzero().flatten().tolist()
        == draw_directions(0, 7, name, 4, 1)
        != [*draw_directions(0, 0, name, 4, 1)]
    )
    skipped = SimpleNamespace(step_was_skipped=True)
    callback.on_step_begin(None, SimpleNamespace(global_step=8), None)
    callback._per_epoch = 100
    callback.on_step_end(None, SimpleNamespace(global_step=9, max_steps=50), None, optimizer=skipped)
    assert callback.step == 9


# Trainers and loops


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int = 16, equal: bool = False) -> None:
        self.ids = torch.randint(3, 64, (n, 12), generator=torch.Generator().manual_seed(0))
        self.ids = self.ids[:1].expand(n, -1) if equal else self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return dict(input_ids=self.ids[i], labels=self.ids[i])


def trainer_of(folder, callback, model=None, callbacks=(), rows=None, **changes) -> Trainer:
    settings = dict(
        num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=100, train_sampling_strategy="sequential",
    )  # fmt: skip
    args = TrainingArguments(folder, **settings | changes)
    trainer = Trainer(model or lora(), args, train_dataset=rows or Rows(), callbacks=[*callbacks, callback])
    trainer.remove_callback(T.PrinterCallback)
    return trainer


class Gradients(TrainerCallback):
    """What the optimizer has seen, at each step."""

    def __init__(self) -> None:
        self.seen = []

    def on_optimizer_step(self, args, state, control, model=None, **_) -> None:
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})


def test_accumulation_changes_nothing(tmp_path):
    """Equal rows, so that one batch of four and four of one have the same gradient: then all else is the same, too."""
    found = []
    for accumulation in (1, 4):
        watch, callback = Gradients(), RMLoRACallback(0.05, directions=1, max_grad_norm=5.0)
        how = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=4 // accumulation)
        model = spread(lora())
        trainer_of(tmp_path, callback, model, [watch], Rows(equal=True), max_grad_norm=0.0, **how).train()
        found.append((dict(model.named_parameters()), watch.seen, callback.history))
    (one, first, history), (four, second, other) = found
    assert len(first) == len(second) == 12
    for a, b in zip(first, second, strict=True):
        for name, grad in a.items():
            assert torch.equal(grad == 0, b[name] == 0)
            torch.testing.assert_close(b[name], grad, atol=1e-6, rtol=1e-5)
    for name, p in one.items():
        torch.testing.assert_close(four[name], p, atol=1e-6, rtol=0)
    assert [(e["step"], e["epoch"]) for e in history] == [(e["step"], e["epoch"]) for e in other]
    assert [(e["step"], e["epoch"]) for e in history] == [(0, 0), (4, 1), (8, 2), (12, 3)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loop_with_accelerate_ends_as_the_trainer(tmp_path, accumulation):
    """To the bit. Only begin and finish stand in the loop."""
    from accelerate import Accelerator

    wanted = RMLoRACallback(0.05, mask="update", seed=3)
    how = dict(
        gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=0.0
    )
    trainer = trainer_of(tmp_path, wanted, **how)
    trainer.train()

    model, callback = lora(), RMLoRACallback(0.05, mask="update", seed=3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01, fused=True
    )
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    callback.begin(model, optimizer)
    model.train()
    for _ in range(3):
        batches = list(loader)
        for i in range(0, len(batches), accumulation):
            group = batches[i : i + accumulation]
            tokens = sum((b["labels"][:, 1:] != -100).sum() for b in group)
            for b in group:
                accelerator.gradient_state._set_sync_gradients(b is group[-1])
                model(**b, num_items_in_batch=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        callback.measure()
    callback.finish()
    mine = dict(model.named_parameters())
    for name, p in trainer.model.named_parameters():
        assert torch.equal(mine[name], p), name
    assert [e["pairs"] for e in callback.history] == [e["pairs"] for e in wanted.history]
    assert [e["step"] for e in callback.history] == [e["step"] for e in wanted.history]
    assert not optimizer.optimizer._optimizer_step_pre_hooks and not optimizer.optimizer._optimizer_step_post_hooks


class Moved(TrainerCallback):
    """Which rows of A each step of a Trainer moves."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, list[int]]] = []

    def on_step_begin(self, args, state, control, model=None, **_):
        self.before = {name: pair.A.rows().clone() for name, pair in low_rank_pairs(model).items()}

    def on_step_end(self, args, state, control, model=None, **_):
        for name, pair in low_rank_pairs(model).items():
            rows = (pair.A.rows() != self.before[name]).any(1).nonzero().flatten().tolist()
            self.seen.append((state.global_step - 1, name, rows))


def test_in_trl(tmp_path):
    """SFTTrainer wraps the model itself; in each of its steps the drawn directions move and no others."""
    trl = pytest.importorskip("trl")
    tokenizer, rows = words_and_rows()
    args = trl.SFTConfig(
        tmp_path, num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, max_length=16, save_strategy="no",
    )  # fmt: skip
    callback, moved = RMLoRACallback(0.1, 1, mask="update"), Moved()
    trainer = trl.SFTTrainer(
        build("Llama"), args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback, moved],
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    assert len(moved.seen) == 8 * 8
    assert all(rows == draw_directions(0, step, name, 4, 1) for step, name, rows in moved.seen)
    first, last = callback.history[0], callback.history[-1]
    assert (first["step"], last["step"], len(first["pairs"])) == (0, 8, 8)
    for name, then in first["pairs"].items():
        assert then["rank"] == 0 < last["pairs"][name]["rank"]  # B was zero
        assert last["pairs"][name]["regulariser"] < then["regulariser"]


@pytest.mark.parametrize("share", [False, True])
def test_pairs_come_and_go_under_imcallback(tmp_path, share):
    """A merge and an injection of half the rank: what comes is regularised and masked from its first step on."""
    watch, change, callback = Gradients(), IMCallback(1, 1), RMLoRACallback(0.05, directions=3)
    model = residuals(share=share, stack="GPT-2")
    trainer_of(tmp_path, callback, model, [change, watch], num_train_epochs=4).train()
    assert [e["move"]["what"] for e in change.history if e["move"]] == ["done", "done"]
    names = [set(entry["pairs"]) for entry in callback.history]
    assert len(names[0]) == 4 and not any("lora" in n or n.endswith(".q") for n in names[0])
    assert sum(n.endswith((".q", ".v")) for n in names[1]) == 2 and len(names[1]) == 4  # two residuals, q and v
    pairs = low_rank_pairs(model)
    assert {pair.A.r for pair in pairs.values()} == {2, 4} and names[-1] == set(pairs)
    for seen in watch.seen[4:]:
        for name, grad in seen.items():
            if "lor2c_A" in name or "lor2c_B" in name:
                assert grad.any(1 if "_A" in name else 0).sum() == 3
            elif "lora_A" in name:
                assert grad.any(1).sum() == 4  # two pairs of rank 2, and 3 directions are more than there are
    for pair in pairs.values():
        assert (
            orthogonality(pair.A.rows(), pair.B.rows().T) < 2 * pair.A.r
        )  # a fresh pair has r for its B and more for A


def test_a_training_goes_on_after_an_injection_of_fewer_directions():
    """What a run may begin with, its checkpoints may be resumed with: injected LoRA has half the rank."""
    model, callback = injected(stack="Llama"), RMLoRACallback(directions=3)
    assert {pair.A.r for pair in low_rank_pairs(model).values()} == {2, 4}
    callback.begin(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), step=12)
    callback.finish()
    with pytest.raises(ValueError, match=r"directions=5, but .*lor2c.* has rank 4: choose 1 to 4"):
        RMLoRACallback(directions=5).check(model)


def test_a_pair_that_diverged_is_named():
    model, callback = spread(lora()), RMLoRACallback()
    callback.begin(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"step 0, model\.layers\.0\.self_attn\.q_proj\.default: .*diverged"):
        callback.measure()
    callback.finish()


def test_the_last_step_is_in_the_history(tmp_path):
    """Also where it is not the end of an epoch; and there is nothing to measure once training is over."""
    callback = RMLoRACallback(0.05)
    trainer_of(tmp_path, callback, max_steps=6).train()
    assert [entry["step"] for entry in callback.history] == [0, 4, 6]
    with pytest.raises(RuntimeError, match="before begin and after finish"):
        callback.measure()


def test_the_history_is_in_the_checkpoints(tmp_path):
    callback = RMLoRACallback(0.05)
    trainer_of(tmp_path, callback, save_strategy="epoch").train()
    stored = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored["RMLoRACallback"]["attributes"]["history"] == callback.history[:3]
    assert RMLoRACallback(**stored["RMLoRACallback"]["args"]).settings == callback.settings

    again = RMLoRACallback(0.05)
    trainer_of(tmp_path, again, save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.history == callback.history
    restored = RMLoRACallback(0.9)  # which Trainer replaces by one with the checkpoint's settings
    how = dict(restore_callback_states_from_checkpoint=True)
    trainer = trainer_of(tmp_path, restored, **how)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    [put] = [c for c in trainer.callback_handler.callbacks if isinstance(c, RMLoRACallback)]
    assert put.history == callback.history and put.settings.coefficient == 0.05
    with pytest.raises(
        ValueError, match="resumed with other settings of RMLoRACallback: coefficient was 0.05, now 0.06"
    ):
        trainer_of(tmp_path, RMLoRACallback(0.06)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    late = RMLoRACallback(0.05)
    trainer_of(tmp_path / "plain", TrainerCallback(), save_strategy="epoch").train()
    trainer_of(tmp_path, late).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-8"))
    assert [entry["step"] for entry in late.history] == [8, 12]  # from here on


def test_a_second_training_starts_anew(tmp_path):
    callback = RMLoRACallback(0.05)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [0, 4, 8, 12]

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, *_, **__) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    trainer.train()  # the hooks of the interrupted training are not in the way
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


# What is refused


def begun(model, callback=None, optimizer=None, **how):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained or [torch.zeros(1)], lr=1e-2)
    (callback or RMLoRACallback(0.1, **how)).begin(model, optimizer)
    return optimizer


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(directions=0), "directions must be a whole number from 1 to the rank of the pairs, found 0"),
        (dict(directions=1.5), "directions must be a whole number"),
        (dict(mask="grad"), "unknown mask 'grad': choose one of None, gradient, update"),
        (dict(reduction="max"), "unknown reduction 'max': choose one of sum, mean"),
        (dict(coefficient=-0.1), "coefficient must be a number of at least 0, found -0.1"),
        (dict(coefficient=float("nan")), "coefficient must be a number"),
        (dict(max_grad_norm=0), "max_grad_norm must be a number above 0, found 0"),
        (dict(rtol=-1), "rtol must be a number of at least 0"),
        (dict(coefficient=0, mask=None), "leave nothing to do"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        RMLoRACallback(**arguments)


class DeepSpeedOptimizerWrapper(torch.optim.SGD):
    """A stand-in with the name of accelerate's class."""


def test_what_it_cannot_work_on():
    dora, shown = lora(use_dora=True), r"model.layers.0.self_attn.q_proj.default"
    adaptive = get_peft_model(
        build("Llama"), AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, target_modules=["q_proj"])
    )
    kasa = lora(kasa_config=KasaConfig())
    blocks = lora(target_modules=["q_proj"], use_bdlora=BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2))
    both = dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    tied = get_peft_model(
        T.LlamaForCausalLM(T.LlamaConfig(**DECODER, tie_word_embeddings=True)),
        LoraConfig(r=4, task_type="CAUSAL_LM", **both),
    )
    grouped = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        grouped = get_peft_model(grouped, LoraConfig(r=4, target_modules=["0"]))
    frozen = lora().requires_grad_(False)
    some = lora()
    first = [p for p in some.parameters() if p.requires_grad][:3]
    for attempt, kind, message in [
        (lambda: begun(dora), ValueError, f"{shown} is DoRA, which scales every row"),
        (lambda: begun(adaptive), ValueError, "AdaLoRA, which has a regulariser of its own"),
        (lambda: begun(kasa), ValueError, "KaSA, which has a diagonal between B and A"),
        (lambda: begun(blocks), ValueError, "BD-LoRA, which has a block-diagonal matrix"),
        (lambda: begun(tied), ValueError, r"embed_tokens\.default and lm_head\.default are tied"),
        (lambda: begun(grouped), ValueError, "grouped convolution"),
        (lambda: begun(BUILD["Llama"]()), ValueError, "no trained low-rank pair"),
        (lambda: begun(frozen), ValueError, "no trained low-rank pair"),
        (lambda: begun(lora(), directions=5), ValueError, f"directions=5, but {shown} has rank 4: choose 1 to 4"),
        (lambda: begun(some, None, torch.optim.SGD(first)), ValueError, "lacks 13 of the pairs' 16 trained matrices"),
        (
            lambda: begun(lora(), None, torch.optim.LBFGS([torch.zeros(1)])),
            TypeError,
            "LBFGS computes gradients inside",
        ),
        (
            lambda: begun(lora(), None, DeepSpeedOptimizerWrapper([torch.zeros(1)])),
            TypeError,
            "under DeepSpeedOptimizer",
        ),
        (lambda: begun(lora(), None, object()), TypeError, "a torch.optim.Optimizer is needed, found object"),
    ]:
        with pytest.raises(kind, match=message):
            attempt()
    begun(lora(), directions=5, mask=None)  # no directions are needed


def test_one_callback_for_an_optimizer(tmp_path):
    model, first = lora(), RMLoRACallback(0.1)
    optimizer = begun(model, first)
    with pytest.raises(ValueError, match="another RMLoRACallback works on this optimizer"):
        begun(model, None, optimizer)
    begun(model, first, optimizer)  # the same once more: it begins again
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    first.finish()
    begun(model, None, optimizer)
    with pytest.raises(ValueError, match="one RMLoRACallback works on an optimizer, found 2"):
        trainer_of(tmp_path, RMLoRACallback(0.1), None, [RMLoRACallback(0.2)]).train()
    with pytest.raises(ValueError, match="the Trainer clips gradients to 1 before.*pass max_grad_norm=0 to Trai"):
        trainer_of(tmp_path, RMLoRACallback(0.1, max_grad_norm=0.5)).train()


def test_steps_that_the_hooks_would_not_see(tmp_path):
    """A closure; an optimizer that was copied, and so lost its hooks."""
    model, callback = lora(), RMLoRACallback(0.1)
    optimizer = begun(model, callback)
    with pytest.raises(TypeError, match="computes gradients after RM-LoRA's work"):
        optimizer.step(lambda: 1.0)
    twin, stored = copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))
    assert twin._handles == stored._handles == () and twin.history == callback.history and callback._handles
    twin.finish()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert not pickle.loads(pickle.dumps(optimizer))._optimizer_step_pre_hooks

    class Copy(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_) -> None:
            optimizer.optimizer = copy.deepcopy(optimizer.optimizer)

    with pytest.raises(RuntimeError, match="took a step without RM-LoRA's hooks"):
        trainer_of(tmp_path, RMLoRACallback(0.1), None, [Copy()]).train()


# Several processes, killed and resumed


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("regularised")
    done = subprocess.run([sys.executable, str(WORKER), str(out)], capture_output=True, text=True, timeout=240)
    assert done.stdout.split("\n")[0] == "[0, 0, -9, 0, 0, 0]", done.stderr[-4000:]
    return out


def read(folder: Path, name: str, rank: int = 0) -> dict:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


def far(a: dict, b: dict) -> float:
    pairs = [(a["parameters"], b["parameters"]), *zip(a["moments"], b["moments"], strict=True)]
    assert all(x.keys() == y.keys() for x, y in pairs)
    return max((x[key] - y[key]).abs().max().item() for x, y in pairs for key in x)


@pytest.mark.parametrize(
    "name, wrapper",
    [
        ("plain", "DistributedDataParallel"),
        ("accumulated", "DistributedDataParallel"),
        ("changing", "DistributedDataParallel"),
        ("sharded", "DTensor"),
        ("sharded_changing", "DTensor"),
    ],
)
def test_two_processes_are_one(ended, name, wrapper):
    """The two equal to the bit, and equal to one process on the joined rows."""
    a, b, alone = read(ended, name, 0), read(ended, name, 1), read(ended / "one", name)
    assert (a["world"], alone["world"], a["wrapper"]) == (2, 1, wrapper)
    assert far(a, b) == 0 and a["history"] == b["history"]
    assert far(a, alone) < 1e-6
    for mine, theirs in zip(a["history"], alone["history"], strict=True):
        assert mine["step"] == theirs["step"] and mine["pairs"].keys() == theirs["pairs"].keys()
        for pair, found in mine["pairs"].items():
            assert found == pytest.approx(theirs["pairs"][pair], rel=1e-4, abs=1e-4)
    first, last = (sum(one["regulariser"] for one in a["history"][i]["pairs"].values()) for i in (0, -1))
    assert last < first
    if "changing" in name:
        down = sum("lor2c_A" in key for key in a["parameters"])
        assert any("lora_A" in key for key in a["parameters"]) and down == (1 if name == "changing" else 2)


def test_killed_and_resumed_is_the_undisturbed_run(ended):
    want, got = read(ended, "undisturbed"), read(ended, "resumed")
    assert far(want, got) == 0 and got["history"] == want["history"]
    assert [entry["step"] for entry in got["history"]] == [0, 4, 8, 12, 16]
    assert DECODER["num_hidden_layers"] == 4 == len(want["history"][0]["pairs"])


def test_zeros_way_is_the_step_before_the_optimizer():
    """One gradient at a time, as ZeRO's hooks do it, is what a step does to all of them."""
    model, settings = lora(), masks.RMSettings(0.1, 2)
    pairs = low_rank_pairs(model)
    factors = {f.p for pair in pairs.values() for f in (pair.A, pair.B)}
    found = {p: masks.work_on_gradient(torch.ones_like(p), p, pairs, settings, 3, 1.0) for p in factors}
    assert all(p.grad is None for p in factors)
    for p in factors:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(factors)
    assert wrappers.zero_of(optimizer) is None
    with pytest.raises(RuntimeError, match="gradients that wait for their step"):
        residual = get_peft_model(build("Llama"), lor2c.LoR2CConfig(r=4))
        trained = next(p for p in residual.parameters() if p.requires_grad)
        trained.grad = torch.ones_like(trained)
        decisions.refuse_waiting_gradients(residual)
    masks.regularise_and_mask(model, optimizer, settings, 3)
    for p in factors:
        torch.testing.assert_close(found[p], p.grad, rtol=0, atol=0)
        assert 0 < (found[p] == 0).float().mean() < 1
