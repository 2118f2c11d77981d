"""ResLoRA against its equations written out with hooks, the life of an adapter, and folding."""

import copy
import json
import math
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny import CLASSIFIERS, DECODER, ENCODER, batch, build, task_type
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import lor2c
from lor2c.inference.adapters import describe
from lor2c.tuners.chains import BlockDown, Chain, InputDown, _links_of, _MeasuredDown, _place_of, chains_of
from lor2c.tuners.stack import named_layers

SHORTCUTS = ("input", "block", "middle")
READING = ("input", "middle")
EXACT = dict(rtol=1e-9, atol=1e-9)
TARGETS = {"ViT": ["q_proj", "v_proj"]}  # the others' are PEFT's defaults


def fill(model, std=0.3, seed=1):
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=std)
    return model.eval()


def adapted(stack, dtype=torch.float32, std=0.3, **settings):
    """The stack's base with ResLoRA whose B is random (std=0: as created)."""
    given = dict(r=2, alpha=6, target_modules=TARGETS.get(stack), task_type=task_type(stack))
    if stack == "ViT":
        given["modules_to_save"] = ["classifier"]
    return fill(get_peft_model(build(stack, dtype), lor2c.ResLoRAConfig(**given | settings)), std)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def held(model):
    chains = {m.chain for m in model.modules() if hasattr(m, "chain")}
    assert chains
    return [tensor for chain in chains for tensor in chain._held.tensors.values()]


# The equations, written out


def six_layers(family):
    torch.manual_seed(0)
    if family == "BERT":
        base = T.BertForSequenceClassification(
            T.BertConfig(**ENCODER | dict(num_hidden_layers=6, initializer_range=0.3))
        )
        names = ["bert.encoder.layer.{}.attention.self.query", "bert.encoder.layer.{}.attention.self.value"]
    else:
        base = T.LlamaForCausalLM(T.LlamaConfig(**DECODER | dict(num_hidden_layers=6)))
        names = ["model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"]
    return base.double().requires_grad_(False).eval(), names


class WrittenOut:
    """Adds a block's delta to the output of a linear layer, from lists of what all blocks were given."""

    def __init__(self, n, blocks, xs, shortcut, m, first, scaling):
        self.n, self.blocks, self.xs = n, blocks, xs
        self.shortcut, self.m, self.first, self.scaling = shortcut, m, first, scaling

    def __call__(self, module, args, output):
        n, (x,) = self.n, args
        self.xs[n] = x
        previous = range(n - 1, -1, -1) if self.m == -1 else range(n - 1, max(n - self.m, 0) - 1, -1)
        A, B = self.blocks[n]
        if self.shortcut == "input":
            total = x.clone()
            for j in previous:
                total = total + self.xs[j]
            if n == 0 and self.first == "double":
                total = x + x
            delta = total @ A.T @ B.T
        elif self.shortcut == "block":
            delta = x @ (B @ A).T
            for j in previous:
                delta = delta + x @ (self.blocks[j][1] @ self.blocks[j][0]).T
        else:
            middle = x @ A.T
            for j in previous:
                middle = middle + self.xs[j] @ self.blocks[j][0].T
            delta = middle @ B.T
        return output + self.scaling * delta


def write_out(base, names, model, shortcut, m, first="double", scaling=3.0):
    """Hooks on a base model's linear layers; {name: (A, B) leaves}."""
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters() if "lora_" in k}
    leaves = {}
    for name in names:
        key = "base_model.model." + name + ".lora_{}.default.weight"
        blocks, xs = [(weights[key.format(n, "A")], weights[key.format(n, "B")]) for n in range(6)], {}
        for n in range(6):
            hook = WrittenOut(n, blocks, xs, shortcut, m, first, scaling)
            base.get_submodule(name.format(n)).register_forward_hook(hook)
            leaves[name.format(n)] = blocks[n]
    return leaves


@pytest.mark.parametrize("m", [1, 4, -1])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_written_out(family, shortcut, m):
    """Logits and gradients equal Eq. 2, 3 and 4, in float64."""
    base, names = six_layers(family)
    first = "none" if m == 4 else "double"
    config = lor2c.ResLoRAConfig(r=2, alpha=6, shortcut=shortcut, pre_num=m, first=first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head stays frozen here
        model = fill(get_peft_model(copy.deepcopy(base), config))
    leaves = write_out(base, names, model, shortcut, m, first)
    b = {k: v for k, v in batch(family).items() if k != "labels"}
    ours, theirs = model(**b).logits, base(**b).logits
    torch.testing.assert_close(ours, theirs, **EXACT)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert len(leaves) == 12 and held(model) == []
    for path, (A, B) in leaves.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        torch.testing.assert_close(layer.lora_A["default"].weight.grad, A.grad, **EXACT)
        torch.testing.assert_close(layer.lora_B["default"].weight.grad, B.grad, **EXACT)
        assert min(A.grad.abs().max(), B.grad.abs().max()) > 1e-6


def test_no_previous_blocks_is_lora():
    """pre_num=0 (Table 4) gives PEFT's LoRA, and the three shortcuts then agree."""
    # checks: ResLoRA Eq. 1
    from peft import LoraConfig

    b = batch("Llama")
    lora = fill(get_peft_model(build("Llama"), LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM")))
    for shortcut in SHORTCUTS:
        model = adapted("Llama", shortcut=shortcut, pre_num=0)
        model.load_state_dict(lora.state_dict())
        assert torch.equal(model(**b).logits, lora(**b).logits)


def test_dropout_is_each_blocks_own():
    """A later block reads the dropped-out input of an earlier one, which PEFT drew once."""
    model = adapted("Llama", shortcut="input", dropout=0.5)
    layers = [m for n, m in model.named_modules() if isinstance(m, LoraLayer) and "q_proj" in n]
    drawn, got = {}, {}
    for n, layer in enumerate(layers):
        layer.lora_dropout["default"].register_forward_hook(lambda _, args, out, n=n: drawn.__setitem__(n, out))
        layer.lora_A["default"].register_forward_hook(lambda _, args, out, n=n: got.__setitem__(n, out))
    model.train()(**batch("Llama"))
    for n in (1, 2, 3):
        want = nn.functional.linear(drawn[n] + drawn[n - 1], layers[n].lora_A["default"].weight)
        torch.testing.assert_close(got[n], want)
    assert (drawn[1] == 0).float().mean() > 0.3


# Chains


def test_chains_by_path():
    assert _place_of("decoder.block.3.layer.1.EncDecAttention.q") == (("decoder.block", "layer.1.EncDecAttention.q"), 3)
    assert _place_of("layers.10.mlp.experts.2.w1") == (("layers", "mlp.experts.2.w1"), 10)
    assert _place_of("lm_head") is None
    shapes = {f"layers.{n}.q": (4, 4) for n in (10, 2, 0, 11)} | {"layers.0.v": (4, 2), "head": (4, 2)}
    assert chains_of(shapes, 1) == [(["layers.0.q", "layers.2.q", "layers.10.q", "layers.11.q"], [[], [0], [1], [2]])]
    assert _links_of([(4, 4), (4, 2), (4, 4), (4, 2)], 1) == [[], [], [], []]  # within reach, or not at all
    assert _links_of([(4, 4), (4, 2), (4, 4), (4, 2)], 2) == [[], [], [0], [1]]


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda m: nn.ModuleList([m, build("Llama")])], ids=["one", "two"])
def test_layers_are_found_behind_other_numbers(wrap):
    """A model inside of a list, as sentence encoders are, or two: layers are linked, and never the models."""
    found = wrap(build("Llama"))
    model = get_peft_model(found, lor2c.ResLoRAConfig(target_modules=["q_proj"], pre_num=1))
    chains = {id(m.chain): m.chain for m in model.modules() if isinstance(m, BlockDown)}.values()
    assert [chain.links for chain in chains] == len(found) * [[[], [0], [1], [2]]]
    assert all(len({path.split(".")[0] for path in chain.paths}) == 1 for chain in chains)


def test_a_new_forward_clears_what_an_old_one_left():
    """Block 1 of a failed forward is not what block 2 reads when block 1 is skipped; other threads are left alone."""
    chain = Chain(["a.0", "a.1", "a.2"], [[], [0], [1, 0]])
    with ThreadPoolExecutor(1) as other:
        other.submit(chain.hold, 1, torch.zeros(1)).result()
        for n in (0, 1, 0):
            chain.hold(n, torch.ones(1))
        assert list(chain._held.tensors) == [0]
        assert other.submit(lambda: list(chain._held.tensors)).result() == [1]
    with pytest.raises(RuntimeError, match=r"a\.2 ran without a\.1"):
        chain.before(2, torch.ones(1))
    with pytest.raises(RuntimeError, match=r"a\.1 got \(2,\) where a\.0.*had \(1,\)"):
        chain.before(1, torch.ones(2))


def test_targets_outside_of_layers_get_lora():
    """A head is in no chain; an encoder and a decoder have chains of their own."""
    model = adapted("Llama", target_modules=["q_proj", "lm_head"], shortcut="input")
    assert type(model.base_model.model.lm_head.lora_A["default"]) is nn.Linear
    t5 = adapted("T5 decoder", shortcut="input")
    chains = {m.chain for m in t5.modules() if isinstance(m, InputDown)}
    assert len(chains) == 6 and {len(chain.paths) for chain in chains} == {4}  # q, v of encoder, decoder, cross
    assert all(len({path.split(".")[0] for path in chain.paths}) == 1 for chain in chains)


class UNet(nn.Module):
    """Layers in two levels, of other widths in each, as diffusers' UNet2DConditionModel names them."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [[nn.ModuleDict({"to_q": nn.Linear(d, d)}) for _ in range(2)] for d in (4, 8)]
        self.down_blocks = nn.ModuleList(nn.ModuleDict({"attentions": nn.ModuleList(b)}) for b in blocks)

    def forward(self, x):
        for block in self.down_blocks:
            for layer in block["attentions"]:
                x = layer["to_q"](x).tanh()
            x = torch.cat([x, x], dim=-1)
        return x


def test_layers_in_two_levels(tmp_path):
    """Appendix C of the paper: linked within a level, whose lists are named."""
    torch.manual_seed(0)
    base, x = UNet(), torch.randn(2, 3, 4)
    settings = dict(r=2, target_modules=["to_q"], layers=[f"down_blocks.{i}.attentions" for i in range(2)])
    assert named_layers(base, settings["layers"][1]) is base.down_blocks[1]["attentions"]
    model = fill(get_peft_model(copy.deepcopy(base), lor2c.ResLoRAConfig(**settings)))
    chains = {tuple(m.chain.paths): m.chain.links for m in model.modules() if isinstance(m, BlockDown)}
    assert chains == {tuple(f"down_blocks.{i}.attentions.{j}.to_q" for j in range(2)): [[], [0]] for i in range(2)}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(x), model.eval()(x))
    for wrong, message in (
        ("down", r"layers='down' must name a list.*'down_blocks\.0\.attentions'"),
        (None, "name the"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(copy.deepcopy(base), lor2c.ResLoRAConfig(**settings | dict(layers=wrong)))


def test_under_fsdp():
    """Weights of other layers are in shards there, so the block shortcut says no; inputs are whole."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for shortcut in ("input", "block"):
            model, alone = adapted("Llama", shortcut=shortcut), adapted("Llama", shortcut=shortcut)
            for layer in model.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            if shortcut == "block":
                with pytest.raises(
                    RuntimeError, match=r"layers\.1.*reads weights of model\.layers\.0.* keeps in shards"
                ):
                    model(**batch("Llama"))
            else:
                torch.testing.assert_close(model(**batch("Llama")).logits, alone(**batch("Llama")).logits)
    finally:
        torch.distributed.destroy_process_group()


def test_all_linear():
    model = adapted("GPT-2", target_modules="all-linear", shortcut="block")
    assert {len(m.chain.paths) for m in model.modules() if hasattr(m, "chain")} == {4}
    assert len({m.chain for m in model.modules() if hasattr(m, "chain")}) == 4  # c_attn, c_proj twice, c_fc


# The life of an adapter

LIFE = ["BERT", "DeBERTa-v2", "GPT-2", "Llama", "T5 decoder", "ViT"]
pairs = pytest.mark.parametrize("stack, shortcut", [(s, SHORTCUTS[i % 3]) for i, s in enumerate(LIFE)])
each_shortcut = pytest.mark.parametrize("shortcut", SHORTCUTS)


@each_shortcut
@pytest.mark.parametrize("stack", LIFE)
def test_life(stack, shortcut, tmp_path):
    """No-op at zero, gradients in adapters only, disable, unload, save and load, copies."""
    b, base = batch(stack), build(stack)
    before = base(**b).logits
    assert torch.equal(adapted(stack, std=0, shortcut=shortcut)(**b).logits, before)
    model = adapted(stack, shortcut=shortcut, pre_num=2)
    want = model(**b)
    want.loss.backward()
    head = stack in CLASSIFIERS or stack == "ViT"
    trained = {n for n, _ in model.named_parameters() if "lora_" in n or (head and "modules_to_save" in n)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert gradients(model).keys() == trained and all(g.any() for g in gradients(model).values())
    with model.disable_adapter():
        assert torch.equal(model(**b).logits, before)
    assert not torch.equal(want.logits, before) and held(model) == []

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(stack), tmp_path).eval()
    assert torch.equal(loaded(**b).logits, want.logits)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**b).logits, want.logits)
        for n, p in twin.named_parameters():
            if "lora_B" in n:
                p.data.zero_()
        assert not torch.equal(twin(**b).logits, want.logits) and torch.equal(model(**b).logits, want.logits)

    body = model.unload()
    assert torch.equal(body(**b).logits, before)
    assert [n for n, _ in body.named_modules()] == [n for n, _ in base.named_modules()]
    for (n, p), (_, q) in zip(body.named_parameters(), base.named_parameters(), strict=True):
        assert torch.equal(p, q), n


@pairs
def test_bf16(stack, shortcut):
    b, model = batch(stack, dtype=torch.bfloat16), adapted(stack, torch.bfloat16, shortcut=shortcut)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    zero = adapted(stack, torch.bfloat16, std=0, shortcut=shortcut)
    assert torch.equal(zero(**b).logits, build(stack, torch.bfloat16)(**b).logits)
    wide = adapted(stack, shortcut=shortcut)(**batch(stack)).logits
    torch.testing.assert_close(model(**b).logits.float(), wide, rtol=0.1, atol=0.1)  # bf16 has 8 bits
    model.train()(**b).loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@each_shortcut
@pytest.mark.parametrize("stack", ["GPT-2", "Llama", "T5 decoder"])
def test_generate(stack, shortcut):
    model, ids = adapted(stack, std=1.0, shortcut=shortcut), batch(stack)["input_ids"][:, :6]
    settings = dict(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    cached, plain = model.generate(**settings, use_cache=True), model.generate(**settings, use_cache=False)
    assert torch.equal(cached, plain) and not torch.equal(plain, build(stack).generate(**settings))
    assert held(model) == []


@pytest.mark.parametrize("stack", ["BERT", "Llama", "T5 decoder"])
def test_checkpointing_with_block_shortcuts(stack):
    def run(checkpoint):
        model = adapted(stack, torch.float64, pre_num=2).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sum(model(**batch(stack, seed, torch.float64)).loss for seed in (1, 2)).backward()
        return gradients(model)

    plain, recomputed = run(False), run(True)
    assert len(plain) >= 16
    torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shortcut", READING)
def test_checkpointing_is_refused_where_inputs_are_read(shortcut):
    model = adapted("Llama", shortcut=shortcut)
    want = model(**batch("Llama")).logits
    model.gradient_checkpointing_enable()
    assert torch.equal(model(**batch("Llama")).logits, want)  # eval does not recompute
    with pytest.raises(ValueError, match=f"shortcut='{shortcut}'.*gradient_checkpointing_disable"):
        model.train()(**batch("Llama"))
    with model.disable_adapter():
        model(**batch("Llama"))
    with pytest.raises(RuntimeError, match="ran without .*q_proj.*shortcut='block'"):  # past PEFT's forward
        model.get_base_model()(**batch("Llama")).loss.backward()
    model.gradient_checkpointing_disable()
    model(**batch("Llama")).loss.backward()


def test_two_adapters():
    """Each with a chain and a shortcut of its own, alone, together, switched off, deleted."""
    b, model = batch("Llama"), adapted("Llama", shortcut="input")
    one = model(**b).logits
    other = lor2c.ResLoRAConfig(r=3, alpha=3, target_modules=["v_proj", "o_proj"], shortcut="middle", pre_num=-1)
    with model.disable_adapter():  # what is added while all are off is off
        model.add_adapter("other", other)
        for n, p in model.named_parameters():
            if "lora_B.other" in n:
                nn.init.normal_(p, std=0.3)
        model.set_adapter("other")
        assert torch.equal(model(**b).logits, build("Llama")(**b).logits)
        model.set_adapter("default")
    assert torch.equal(model.eval()(**b).logits, one)
    model.set_adapter("other")
    two = model(**b).logits
    alone = get_peft_model(build("Llama"), other).eval()
    alone.load_state_dict({n.replace(".other.", ".default."): v for n, v in model.state_dict().items()}, strict=False)
    assert torch.equal(alone(**b).logits, two) and not torch.equal(one, two)
    model.base_model.set_adapter(["default", "other"])
    both = model(**b).logits
    assert not torch.equal(both, one) and not torch.equal(both, two) and held(model) == []
    model.set_adapter("default")
    assert torch.equal(model(**b).logits, one)
    model.delete_adapter("other")
    assert torch.equal(model(**b).logits, one) and not any("other" in n for n, _ in model.named_parameters())


def test_deleting_leaves_one_adapter_active_in_all_layers():
    """Adapters on different modules: PEFT would switch on another one in each layer."""
    model = adapted("Llama", shortcut="input", target_modules=["q_proj"])
    for name, targets in (("a", ["v_proj"]), ("b", ["q_proj", "v_proj"])):
        config = lor2c.ResLoRAConfig(r=2, alpha=6, shortcut="input", target_modules=targets, task_type="CAUSAL_LM")
        model.add_adapter(name, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which one it chooses
        model.delete_adapter("default")
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert {tuple(m.active_adapters) for m in layers if m.lora_A} == {("b",)}
    model.eval()(**batch("Llama"))


def test_compile():
    """Forward and backward of a compiled model with all three against the eager one, windows included."""
    b, results = {k: v for k, v in batch("Llama").items() if k != "labels"}, []
    for compiled in (False, True):
        torch.manual_seed(0)
        configs = {shortcut: lor2c.ResLoRAConfig(r=2, alpha=6, shortcut=shortcut) for shortcut in SHORTCUTS}
        model = get_peft_model(tiny_llama(num_hidden_layers=2), configs["input"], adapter_name="input")
        for shortcut in ("block", "middle"):
            model.add_adapter(shortcut, configs[shortcut])
        model.base_model.set_adapter(list(SHORTCUTS))
        fill(model).train()
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        logits = run(**b).logits
        logits.square().mean().backward()
        results.append((logits.detach(), gradients(model), {n: p for n, p in model.named_buffers() if "norms" in n}))
        assert held(model) == []
    assert len(results[0][1]) == 3 * 2 * 2 * 2 and len(results[0][2]) == 2 * 2 * 2
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_trainer_resumes_and_fetches_the_best(tmp_path):
    """Resuming gives the weights and the windows of a run that was not interrupted."""
    rows = [{k: v[i] for k, v in batch("BERT", seed).items()} for seed in range(4) for i in range(2)]

    def trainer(folder, **settings):
        args = TrainingArguments(
            folder, num_train_epochs=4, eval_strategy="epoch", save_strategy="epoch", learning_rate=0.02, seed=3,
            report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, **settings,
        )  # fmt: skip
        model = adapted("BERT", std=0, shortcut="middle", window=5)
        return Trainer(model, args, train_dataset=rows, eval_dataset=rows)

    whole = trainer(tmp_path / "whole", load_best_model_at_end=True)
    whole.train()
    best = json.loads((tmp_path / "whole/checkpoint-8/trainer_state.json").read_text())["best_model_checkpoint"]
    got, want = get_peft_model_state_dict(whole.model), load_file(f"{best}/adapter_model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    got = get_peft_model_state_dict(again.model)
    want = load_file(tmp_path / "whole/checkpoint-8/adapter_model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    counts = [v.item() for k, v in want.items() if k.endswith("lora_A.count")]
    assert counts == [8] * 8 and any(k.endswith("lora_A.norms") for k in want)


def test_low_memory_loading(tmp_path):
    """low_cpu_mem_usage starts on the meta device; on a bf16 base PEFT then casts the adapter, but not its norms."""
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted("Llama", dtype, shortcut="input").train()
        model(**batch("Llama"))
        model.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build("Llama", dtype), tmp_path, low_cpu_mem_usage=True).eval()
        assert not any(t.is_meta for t in loaded.state_dict().values())
        far = (loaded(**batch("Llama")).logits - model(**batch("Llama")).logits).abs().max()
        assert far == 0 if dtype == torch.float32 else far < 0.01
        assert loaded.fold("input").alphas == model.fold("input").alphas


def test_threads_and_failed_forwards():
    """Forwards of several threads keep apart; what a failed one left is neither used, copied nor kept."""
    model = adapted("Llama", shortcut="input", pre_num=-1)
    batches = [batch("Llama", seed) for seed in range(4)]
    with torch.no_grad():
        want, wrong = [model(**b).logits for b in batches], []

        def work(i):
            for _ in range(10):
                with torch.no_grad():
                    if not torch.allclose(model(**batches[i]).logits, want[i], atol=1e-6):
                        wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong
        handle = model.base_model.model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batches[0])
        handle.remove()
        assert held(model) and held(copy.deepcopy(model)) == held(pickle.loads(pickle.dumps(model))) == []
        one = model(input_ids=batches[0]["input_ids"][:1]).logits  # another shape than what was left
        torch.testing.assert_close(one, want[0][:1], rtol=1e-5, atol=1e-6)
        assert held(model) == []


# Refusals


def tiny_llama(**changes):
    return T.LlamaForCausalLM(T.LlamaConfig(**DECODER | changes))


def opt():
    tiny = dict(hidden_size=16, ffn_dim=32, num_hidden_layers=4, num_attention_heads=2, word_embed_proj_dim=16)
    return T.OPTForCausalLM(T.OPTConfig(vocab_size=64, layerdrop=0.5, **tiny))


def experts():
    layers = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])}) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


@pytest.mark.parametrize(
    "base, settings, message",
    [
        (
            lambda: tiny_llama(num_hidden_layers=1),
            dict(),
            r"nothing to link.*layers\.0\.self_attn\.q_proj \(16 to 16\)",
        ),
        (tiny_llama, dict(target_modules=["embed_tokens"]), "embed_tokens is no linear map but Embedding"),
        (opt, dict(shortcut="input"), r"layerdrop=0\.5.*shortcut='block'"),
        (experts, dict(shortcut="middle", target_modules=["experts.0"]), r"experts\.0 sees tokens of its own"),
    ],
    ids=["one layer", "embedding", "layerdrop", "experts"],
)
def test_models_that_do_not_fit_are_left_alone(base, settings, message):
    model = base()
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, lor2c.ResLoRAConfig(**settings))
    assert [n for n, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(lora_alpha=4), TypeError, "use alpha"),
        (dict(lora_dropout=0.1), TypeError, "use dropout"),
        (dict(r=0), ValueError, "found 0"),
        (dict(alpha=-1), ValueError, "found -1"),
        (dict(dropout=1), ValueError, "found 1"),
        (dict(pre_num=-2), ValueError, "at least -1, found -2"),
        (dict(window=0), ValueError, "at least 1, found 0"),
        (dict(shortcut="out"), ValueError, "input, block, middle, found 'out'"),
        (dict(first="zero"), ValueError, "double, none, found 'zero'"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        lor2c.ResLoRAConfig(**settings)


def test_merging_without_folding_is_refused():
    model, base = adapted("Llama"), build("Llama")
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    for merge in (
        model.merge_and_unload,
        model.base_model.merge_adapter,
        layer.merge,
        lambda: layer.get_delta_weight("default"),
        lambda: copy.deepcopy(model).merge_and_unload(),
    ):
        with pytest.raises(ValueError, match=r"fold it first, model\.fold"):
            merge()
    assert not model.supports_lora_conversion()
    assert torch.equal(model.unload()(**batch("Llama")).logits, base(**batch("Llama")).logits)


@each_shortcut
def test_replicas_are_refused(shortcut):
    model = adapted("Llama", shortcut=shortcut)
    next(m for m in model.modules() if hasattr(m, "chain"))._is_replica = True  # what replicate() sets
    with pytest.raises(RuntimeError, match="torchrun or accelerate launch"):
        model(**batch("Llama"))


# Folding


def minilm(**settings):
    torch.manual_seed(0)
    base = T.AutoModelForSequenceClassification.from_pretrained(lor2c.demo_model(), num_labels=2).double().eval()
    return base, {n: p.clone() for n, p in base.named_parameters()}


def sentences():
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(1000, 3000, (3, 9), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("m", [1, 4, -1])
def test_block_shortcuts_fold_exactly(m, tmp_path):
    """Eq. 5, on a pretrained encoder: put on, saved and loaded by PEFT alone, and merged."""
    # checks: ResLoRA Eq. 5
    (base, weights), b = minilm(), sentences()
    settings = dict(r=2, alpha=6, shortcut="block", pre_num=m, task_type="SEQ_CLS")
    model = fill(get_peft_model(base, lor2c.ResLoRAConfig(**settings)), std=0.1)
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight, std=0.1)  # a trained head
    want, plain = model(**b).logits, minilm()[0](**b).logits
    folded = model.fold()
    folded.save_pretrained(tmp_path / "plain")
    assert (
        sorted({2, *folded.config.rank_pattern.values(), folded.config.r}) == [2 * n for n in range(1, 7)][: m % 7 + 1]
    )
    loaded = PeftModel.from_pretrained(minilm()[0], tmp_path / "plain").eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    for other in (folded.put_on(minilm()[0]), loaded, loaded.merge_and_unload()):
        torch.testing.assert_close(other(**b).logits, want, rtol=0, atol=1e-9)
    assert (want - plain).abs().max() > 0.1
    assert folded.error(model, **b)["max_abs"] < 1e-9 and torch.equal(model(**b).logits, want)
    left = dict(model.unload().named_parameters())
    assert all(torch.equal(left[n], p) for n, p in weights.items() if "classifier" not in n)


FRESH = """
import sys, torch
sys.path.insert(0, {tests!r})
from peft import PeftModel
from tiny import batch, build
want = torch.load("{folder}/want.pt")
def load(name):
    return PeftModel.from_pretrained(build("GPT-2"), f"{folder}/{{name}}").eval()
folded = load("folded")
assert "lor2c" not in sys.modules
logits = folded(**batch("GPT-2")).logits
merged = folded.merge_and_unload()(**batch("GPT-2")).logits
import lor2c
own = load("own")(**batch("GPT-2")).logits
print("RESULT", torch.equal(own, want), torch.allclose(logits, want, atol=1e-5), torch.allclose(merged, want, atol=1e-5))
"""


def test_fresh_process(tmp_path):
    """What was folded loads without lor2c, the adapter itself with it; the base has Conv1D."""
    model = adapted("GPT-2", pre_num=2)
    model.fold().save_pretrained(tmp_path / "folded")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folded"]
    model.save_pretrained(tmp_path / "own")
    assert "import lor2c" in (tmp_path / "own/README.md").read_text()
    torch.save(model(**batch("GPT-2")).logits, tmp_path / "want.pt")
    code = FRESH.format(tests=str(Path(__file__).parents[1]), folder=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RESULT True True True" in done.stdout, done.stderr[-2000:]


def recorded(model, name, batches):
    """The inputs of every block of a chain, and A x, in train mode: [batch][block]."""
    xs = []
    layers = [model.get_submodule(f"base_model.model.{name.format(n)}") for n in range(6)]
    hooks = [m.register_forward_pre_hook(lambda _, args: xs[-1].append(args[0].detach())) for m in layers]
    model.train()
    for b in batches:
        xs.append([])
        model(**b)
    model.eval()
    [hook.remove() for hook in hooks]
    A = [layer.lora_A["default"].weight.detach() for layer in layers]
    B = [layer.lora_B["default"].weight.detach() for layer in layers]
    return xs, A, B


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("shortcut", READING)
def test_folding_from_inputs(shortcut, m, tmp_path):
    """Eq. 9 and 12 written out from recorded inputs; the window is the last three of four batches, and is saved."""
    # checks: ResLoRA Eq. 7, 8, 9, 12
    base, names = six_layers("Llama")
    weights = {n: p.clone() for n, p in base.named_parameters()}
    settings = dict(r=2, alpha=6, shortcut=shortcut, pre_num=m, window=3, task_type="CAUSAL_LM")
    model = fill(get_peft_model(base, lor2c.ResLoRAConfig(**settings)))
    batches = [batch("Llama", seed) for seed in range(4)]
    xs, A, B = recorded(model, names[0], batches)
    with torch.no_grad():
        sizes = [[x if shortcut == "input" else x @ a.T for x, a in zip(some, A, strict=True)] for some in xs[1:]]
        f = [sum(some[n].square().sum().sqrt() for some in sizes) / 3 for n in range(6)]
        folded = model.fold("input")
        for n in range(6):
            path = names[0].format(n)
            want = [(f[j] / f[n]).item() for j in range(n - 1, max(n - m, 0) - 1, -1)]
            want = [1.0] if n == 0 and shortcut == "input" else want
            torch.testing.assert_close(folded.alphas[path], want, **EXACT)
            key = f"base_model.model.{path}.lora_"
            product = folded.tensors[key + "B.weight"] @ folded.tensors[key + "A.weight"]
            torch.testing.assert_close(product, (1 + sum(want)) * B[n] @ A[n], **EXACT)
    assert folded.config.r == 2 and not folded.config.rank_pattern
    check_error(model, folded, six_layers("Llama")[0])
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(six_layers("Llama")[0], tmp_path / "adapter").eval()
    assert loaded.fold("input").alphas == folded.alphas
    left = dict(model.unload().named_parameters())
    assert all(torch.equal(left[n], p) for n, p in weights.items())


def check_error(model, folded, base):
    """`error` is what the folded adapter gives on a base of its own; nothing of the model is changed."""
    b = {k: v for k, v in batch("Llama", 7).items() if k != "labels"}
    model.train()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    error = folded.error(model, **b)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    own, other = model.eval()(**b).logits, folded.put_on(base)(**b).logits
    assert abs(error["max_abs"] - (own - other).abs().max()) < 1e-9
    assert abs(error["relative"] - (own - other).norm() / own.norm()) < 1e-9
    assert 1e-6 < error["relative"] < math.inf


@pytest.mark.parametrize("first", ["double", "none"])
@pytest.mark.parametrize("m", [1, 3])
def test_folding_from_weights(m, first):
    """Eq. 11 written out from the first layer on, without any data."""
    # checks: ResLoRA Eq. 7, 10, 11
    base, names = six_layers("Llama")
    config = lor2c.ResLoRAConfig(r=2, alpha=6, shortcut="input", pre_num=m, first=first, task_type="CAUSAL_LM")
    model = fill(get_peft_model(base, config))
    folded, f = model.fold("weight"), []
    for n in range(6):
        path = names[1].format(n)
        layer = model.get_submodule(f"base_model.model.{path}")
        want = [(f[j - 1] / f[n - 1]).item() if j > 0 else 1.0 for j in range(n - 1, max(n - m, 0) - 1, -1)]
        want = [1.0] if n == 0 and first == "double" else want
        torch.testing.assert_close(folded.alphas[path], want, **EXACT)
        with torch.no_grad():
            delta = 3.0 * (1 + sum(want)) * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            f.append((layer.base_layer.weight + delta).square().sum().sqrt())
            got = folded.tensors[f"base_model.model.{path}.lora_B.weight"] @ layer.lora_A["default"].weight
            torch.testing.assert_close(3.0 * got, delta, **EXACT)
    check_error(model, folded, six_layers("Llama")[0])


@pytest.mark.parametrize("name", ["c_attn", "c_proj"])  # c_proj is square
def test_folding_from_weights_on_conv1d(name):
    """The weight of a Conv1D is transposed: the norm of the fold is that of W + B A."""
    targets = rf".*attn\.{name}"
    model, f = adapted("GPT-2", torch.float64, shortcut="input", target_modules=targets), []
    for n in range(2):
        layer = model.get_submodule(f"base_model.model.transformer.h.{n}.attn.{name}")
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        f.append(torch.linalg.norm(layer.base_layer.weight.T + 3.0 * 2 * B @ A).item())  # alpha* is 1 in both
    torch.testing.assert_close(model.fold("weight").alphas[f"transformer.h.2.attn.{name}"], [f[0] / f[1]], **EXACT)


def test_folding_leaves_an_8_bit_base_alone(tmp_path):
    """PEFT's dequantisation puts the weight of a module on a CPU back without its scales."""
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=32).save_pretrained(tmp_path)
    base = T.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=T.BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    model = get_peft_model(base, lor2c.ResLoRAConfig(r=2, shortcut="input", pre_num=2, task_type="CAUSAL_LM"))
    b = batch("Llama")
    want = fill(model, std=0.1).eval()(**b).logits
    folded = model.fold("weight")
    assert torch.equal(model(**b).logits, want) and math.isfinite(folded.error(model, **b)["relative"])


def test_folding_middles_by_norms_of_inputs():
    """Eq. 13: sums of A, weighted by f_{n-k} / f_n of the inputs."""
    # checks: ResLoRA Eq. 13
    base, names = six_layers("Llama")
    config = lor2c.ResLoRAConfig(r=2, alpha=6, shortcut="middle", pre_num=2, task_type="CAUSAL_LM")
    model = fill(get_peft_model(base, config))
    xs, A, B = recorded(model, names[0], [batch("Llama", seed) for seed in range(2)])
    f = [(xs[0][n].norm() + xs[1][n].norm()) / 2 for n in range(6)]
    folded = model.fold("weight")
    for n in range(6):
        want = A[n].clone()
        for j in range(max(n - 2, 0), n):
            want += f[j] / f[n] * A[j]
        path = f"base_model.model.{names[0].format(n)}"
        torch.testing.assert_close(folded.tensors[f"{path}.lora_A.weight"], want, **EXACT)
        assert torch.equal(folded.tensors[f"{path}.lora_B.weight"], B[n])
    check_error(model, folded, six_layers("Llama")[0])


def test_truncation_is_the_dense_svds():
    base, names = six_layers("BERT")
    config = lor2c.ResLoRAConfig(r=2, alpha=6, shortcut="block", pre_num=3, task_type="SEQ_CLS")
    model = fill(get_peft_model(base, config))
    whole, cut = model.fold(), model.fold(rank=3)
    assert len(cut.truncation) == 10 and cut.config.r == 3  # the first block of each chain has rank 2 as it is
    for path, lost in cut.truncation.items():
        key = f"base_model.model.{path}.lora_"
        dense = whole.tensors[key + "B.weight"] @ whole.tensors[key + "A.weight"]
        U, values, V = torch.linalg.svd(dense)
        short = cut.tensors[key + "B.weight"] @ cut.tensors[key + "A.weight"]
        torch.testing.assert_close(short, U[:, :3] * values[:3] @ V[:3], **EXACT)
        assert abs(lost - values[3:].norm() / values.norm()) < 1e-9 and lost > 0.01
    b = {k: v for k, v in batch("BERT").items() if k != "labels"}
    put_on = cut.put_on(six_layers("BERT")[0])
    assert {m.scaling["default"] for m in put_on.modules() if isinstance(m, LoraLayer)} == {3.0}
    gap = (put_on(**b).logits - model(**b).logits).abs().max()
    assert abs(cut.error(model, **b)["max_abs"] - gap) < 1e-9


def test_what_is_folded_does_not_follow_the_model():
    """Training goes on without changing what was folded, and `error` then says so."""
    model, b = adapted("BERT"), {k: v for k, v in batch("BERT").items() if k != "labels"}
    folded = model.fold()
    assert folded.error(model, **b)["max_abs"] < 1e-6
    before = {key: tensor.clone() for key, tensor in folded.tensors.items()}
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1.5)
    assert len(before) == 4 * 2 * 2 + 2 and all(torch.equal(folded.tensors[key], before[key]) for key in before)
    assert folded.error(model, **b)["max_abs"] > 1e-4
    with pytest.raises(AttributeError):
        folded.tensors = {}


def test_a_second_adapter_folds_by_its_name():
    b, model = {k: v for k, v in batch("Llama").items() if k != "labels"}, adapted("Llama", shortcut="input")
    model.add_adapter("other", lor2c.ResLoRAConfig(r=3, alpha=3, pre_num=-1, task_type="CAUSAL_LM"))
    fill(model, seed=4)
    model.set_adapter("other")
    folded = model.fold(adapter_name="other")
    torch.testing.assert_close(folded.put_on(build("Llama"))(**b).logits, model(**b).logits, rtol=1e-5, atol=1e-6)
    assert folded.error(model, **b)["max_abs"] < 1e-6
    model.set_adapter("default")
    with pytest.raises(ValueError, match="'other' is not the active one"):
        folded.error(model, **b)


def test_folding_is_refused_where_it_does_not_fit(tmp_path):
    reading, block = adapted("Llama", shortcut="input"), adapted("Llama")
    for fold, message in [
        (lambda: reading.fold(), "only an approximation exists"),
        (lambda: adapted("Llama", shortcut="middle").fold("exact"), "only an approximation exists"),
        (lambda: reading.fold("input"), "run some batches through the model in train mode"),
        (lambda: adapted("Llama", shortcut="middle").fold("weight"), "in train mode"),
        (lambda: block.fold("input"), "shortcut='block' needs no approximation"),
        (lambda: adapted("Llama", shortcut="input", pre_num=0).fold("weight"), "pre_num=0 needs no approximation"),
        (lambda: block.fold("mean"), "exact, input, weight, found 'mean'"),
        (lambda: block.fold(adapter_name="x"), "no adapter 'x'"),
        (lambda: block.fold(rank=0), "rank"),
        (lambda: block.fold().put_on(block.base_model.model), "has adapters already"),
        (lambda: block.fold().put_on(tiny_llama(num_hidden_layers=2)), "does not fit this base"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold()
    assert adapted("Llama", shortcut="input", pre_num=0).fold().error(
        adapted("Llama", shortcut="input", pre_num=0), input_ids=batch("Llama")["input_ids"]
    ) == {"max_abs": 0.0, "relative": 0.0}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        block.fold().save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    block.save_pretrained(tmp_path / "block")
    with pytest.raises(FileExistsError, match="holds the RESLORA adapter"):
        block.fold().save_pretrained(tmp_path / "block")
    for _ in range(2):  # an adapter of LoRA is replaced
        block.fold().save_pretrained(tmp_path / "plain")


def test_an_adapter_folder_is_described(tmp_path):
    adapted("Llama", shortcut="middle").save_pretrained(tmp_path)
    assert "RESLORA adapter" in describe(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.rsplit(".lora_", 1)[1] for key in keys} == {"A.weight", "A.norms", "A.count", "B.weight"}


def test_norms_survive_casts():
    model = adapted("Llama", shortcut="input").train()
    model(**batch("Llama"))
    before = {n: b.clone() for n, b in model.named_buffers() if "norms" in n}
    model.half()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if "norms" in n)
    assert any(isinstance(m, _MeasuredDown) for m in model.modules())
