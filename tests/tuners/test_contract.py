"""What every stack of layers must do under LoR2C: one table, stack by item.

An item that does not apply to a stack is n/a with a reason; the set of those is asserted, so that it cannot grow unseen.
Every case has a residual around one layer and a longer one around three.
"""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import CLASSIFIERS, SPANS, STACKS, adapted, batch, build, gradients, layers_path, task_type

import lor2c

TABLE: dict[tuple[str, str], str] = {}  # (stack, item) -> "yes", "n/a" or "FAILED"


def equal(a, b) -> bool:
    return torch.equal(a.logits, b.logits)


def no_op_at_zero(stack):
    b = batch(stack)
    assert equal(adapted(stack, std=0)(**b), build(stack)(**b))


def only_adapters_learn(stack):
    model = adapted(stack)
    model(**batch(stack)).loss.backward()
    head = stack in CLASSIFIERS or stack == "ViT"
    wanted = {n for n, _ in model.named_parameters() if "lor2c_" in n or (head and "modules_to_save" in n)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    assert {n for n, g in gradients(model).items() if g.any()} == wanted
    assert sum("lor2c_" in n for n in wanted) == 2 * len(SPANS)


def disable(stack):
    b, model = batch(stack), adapted(stack)
    with model.disable_adapter():
        off = model(**b)
    assert equal(off, build(stack)(**b)) and not equal(model(**b), off)


def unload(stack):
    b, body, base = batch(stack), adapted(stack).unload(), build(stack)
    assert equal(body(**b), base(**b))
    assert [n for n, _ in body.named_modules()] == [n for n, _ in base.named_modules()]
    assert [len(m._forward_hooks) for m in body.modules()] == [len(m._forward_hooks) for m in base.modules()]
    assert not any(m._forward_pre_hooks for m in body.modules())
    trained = adapted(stack)
    heads = [p for n, p in trained.named_parameters() if "modules_to_save" in n]
    for p in heads:
        p.data.add_(1)
    left = dict(trained.unload().named_parameters())  # a trained head stays, as a plain module
    moved = [n for n, p in base.named_parameters() if not torch.equal(p, left[n])]
    assert len(moved) == len(heads) and all("classifier" in n for n in moved)


def second_adapter(stack):
    b, model = batch(stack), adapted(stack)
    one = model(**b)
    other = lor2c.LoR2CConfig(
        r=3, alpha=3, spans=[[0, 1], [2, 2]], layers=layers_path(stack), task_type=task_type(stack)
    )
    model.add_adapter("other", other)
    assert equal(model.eval()(**b), one)  # added, not active
    for n, p in model.named_parameters():
        if "lor2c_B.other" in n:
            torch.nn.init.normal_(p, std=0.2)
    model.set_adapter("other")
    two = model(**b)
    assert not equal(two, one)
    if stack not in CLASSIFIERS:  # PEFT lets only one of two trained heads be active
        model.base_model.set_adapter(["default", "other"])
        both = model(**b)
        assert not equal(both, two) and not equal(both, one)
    model.set_adapter("default")
    assert equal(model(**b), one)
    model.delete_adapter("other")
    assert equal(model(**b), one) and not any("other" in n for n, _ in model.named_parameters())
    ends = [n for n, m in model.named_modules() if isinstance(m, lor2c.LoR2CLayer)]
    assert len(ends) == len(SPANS)  # nothing of the deleted one is left


def copied(stack):
    b, model = batch(stack), adapted(stack)
    want = model(**b)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(twin(**b), want)
        for n, p in twin.named_parameters():
            if "lor2c_B" in n:
                p.data.zero_()
        assert not equal(twin(**b), want) and equal(model(**b), want)  # each has its own parts


def bf16(stack):
    b = batch(stack, dtype=torch.bfloat16)
    model = adapted(stack, torch.bfloat16)
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    assert {d for n, d in kinds.items() if "lor2c_" in n} == {torch.float32}
    assert {d for n, d in kinds.items() if "lor2c_" not in n and "modules_to_save" not in n} == {torch.bfloat16}
    assert equal(adapted(stack, torch.bfloat16, std=0)(**b), build(stack, torch.bfloat16)(**b))
    wide = adapted(stack)(**batch(stack)).logits
    torch.testing.assert_close(model(**b).logits.float(), wide, rtol=0.1, atol=0.1)  # bf16 has 8 bits
    model(**b).loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def checkpointing(stack):
    """Two forwards before one backward, with and without recomputing."""

    def run(checkpoint):
        model = adapted(stack, torch.float64)
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = sum(model(**batch(stack, seed, torch.float64)).loss for seed in (1, 2))
        loss.backward()
        layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        return gradients(model), len(layers)

    (plain, none), (recomputed, some) = run(False), run(True)
    assert none == 0 and some >= 4
    assert plain.keys() == recomputed.keys() and len(plain) >= 2 * len(SPANS)
    torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)


def compile_fullgraph(stack):
    """Forward and backward of the compiled model against the eager one; the loss is ours, as some models' loss logs."""
    b = batch(stack)
    labels = b.pop("labels")
    if stack.startswith("T5"):
        b["decoder_input_ids"] = labels
    results = []
    for compiled in (False, True):
        model = adapted(stack)
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        logits = run(**b).logits
        logits.square().mean().backward()
        results.append((logits.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def generate(stack):
    model, ids = adapted(stack, std=1.0), batch(stack)["input_ids"][:, :6]
    settings = dict(input_ids=ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    cached, plain = model.generate(**settings, use_cache=True), model.generate(**settings, use_cache=False)
    assert torch.equal(cached, plain)
    base = build(stack).generate(**settings)
    assert not torch.equal(base, plain)  # the residuals take part


def hidden_states(stack):
    b, model = batch(stack), adapted(stack)
    kinds = {"T5 encoder": "encoder_hidden_states", "T5 decoder": "decoder_hidden_states"}
    key = kinds.get(stack, "hidden_states")
    with model.disable_adapter():
        base = model(**b, output_hidden_states=True)[key]
    states = model(**b, output_hidden_states=True)[key]
    same = [torch.equal(x, y) for x, y in zip(states, base, strict=True)]
    assert same == [True, False, False, False, False]


FRESH = """
import json, sys, torch
sys.path.insert(0, {tests!r})
import lor2c
from peft import PeftModel
from tiny import STACKS, batch, build
got = {{}}
for stack in STACKS:
    model = PeftModel.from_pretrained(build(stack), f"{folder}/{{stack}}").eval()
    want = torch.load(f"{folder}/{{stack}}.pt")
    got[stack] = torch.equal(model(**batch(stack)).logits, want)
print("RESULT", json.dumps(got))
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    """{stack: whether logits are the same bits} after saving here and loading in another process."""
    folder = tmp_path_factory.mktemp("saved")
    for stack in STACKS:
        model = adapted(stack)
        model.save_pretrained(folder / stack)
        torch.save(model(**batch(stack)).logits, folder / f"{stack}.pt")
    code = FRESH.format(tests=str(Path(__file__).parents[1]), folder=folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert done.returncode == 0 and lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT"))


ITEMS = {
    "no-op at zero": no_op_at_zero,
    "only adapters learn": only_adapters_learn,
    "disable": disable,
    "unload": unload,
    "save, fresh process": None,  # from the fixture: one process for all stacks
    "second adapter": second_adapter,
    "deepcopy, pickle": copied,
    "bf16 base": bf16,
    "checkpointing": checkpointing,
    "hidden states": hidden_states,
    "generate": generate,
    "compile": compile_fullgraph,
}
NO_LM = "has no language model head, so it does not generate"
NOT_APPLICABLE = {
    ("BERT", "generate"): NO_LM,
    ("RoBERTa", "generate"): NO_LM,
    ("DistilBERT", "generate"): NO_LM,
    ("DeBERTa-v2", "generate"): NO_LM,
    ("ViT", "generate"): NO_LM,
}


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("stack", STACKS)
def test_item(stack, item, request):
    TABLE[stack, item] = "FAILED"
    if item == "save, fresh process":
        assert request.getfixturevalue("fresh_process")[stack]
    elif item == "generate" and not build(stack).can_generate():
        TABLE[stack, item] = "n/a"
        return
    else:
        ITEMS[item](stack)
    TABLE[stack, item] = "yes"


def test_table(capsys):
    """Prints the contract; fails if an n/a came or went."""
    if len(TABLE) < len(STACKS) * len(ITEMS):
        pytest.skip("the table needs every case of test_item in the same run")
    rows = [["item", *STACKS]] + [[item, *(TABLE[s, item] for s in STACKS)] for item in ITEMS]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    with capsys.disabled():
        print("\n\nThe contract, spans", SPANS)
        for row in rows:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)))
        for (stack, item), reason in sorted(NOT_APPLICABLE.items()):
            print(f"n/a  {item}, {stack}: {reason}")
    assert {case for case, result in TABLE.items() if result != "yes"} == NOT_APPLICABLE.keys()
    assert all(TABLE[case] == "n/a" for case in NOT_APPLICABLE)
