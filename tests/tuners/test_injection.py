"""Injected LoRA: on q and v of every family and on nothing else, PEFT's own in all it does, and known by its mark."""

import copy
import pickle

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import DECODER, STACKS, batch, build, layers_path, task_type
from torch import nn

import lor2c
from lor2c.disk.tensors import read_mark
from lor2c.maths.layout import Injection, Layout
from lor2c.training.surgery import merge_modules
from lor2c.tuners.injection import FusedUp, add_lora, find_qv, injected, remove_lora
from lor2c.tuners.residual import pairs_of
from lor2c.tuners.stack import find_layers

QV = {
    "BERT": ("attention.self.query", "attention.self.value"),
    "RoBERTa": ("attention.self.query", "attention.self.value"),
    "DistilBERT": ("attention.q_lin", "attention.v_lin"),
    "DeBERTa-v2": ("attention.self.query_proj", "attention.self.value_proj"),
    "GPT-2": ("attn.c_attn",),
    "Llama": ("self_attn.q_proj", "self_attn.v_proj"),
    "Qwen 3": ("self_attn.q_proj", "self_attn.v_proj"),
    "Gemma 3": ("self_attn.q_proj", "self_attn.v_proj"),
    "T5 encoder": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.v"),
    "T5 decoder": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.v"),  # not EncDecAttention
    "ViT": ("attention.q_proj", "attention.v_proj"),
}
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
STILL = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
FUSED = {
    "GPT-2": T.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, **STILL, **ENDS),
    "Phi-3": T.Phi3Config(**SIZE, num_key_value_heads=2, **ENDS),
    "Phi-3, one kv head": T.Phi3Config(**SIZE, num_key_value_heads=1, **ENDS),
    "ModernBERT": T.ModernBertConfig(**SIZE, cls_token_id=1, sep_token_id=2, **ENDS),
    "GPT-NeoX": T.GPTNeoXConfig(**SIZE, **ENDS),
    "BLOOM": T.BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4, **ENDS),
}
each_stack = pytest.mark.parametrize("stack", STACKS)
each_fused = pytest.mark.parametrize("family", FUSED)
each_kind = pytest.mark.parametrize("kind", ["Llama", *FUSED])  # a projection for each, and all fused ones
IDS = torch.arange(3, 17).view(2, 7)


def base_of(kind: str) -> nn.Module:
    """A model without a head; attention written out, so that its probabilities can be seen."""
    torch.manual_seed(0)
    config = T.LlamaConfig(**DECODER) if kind == "Llama" else FUSED[kind]
    return T.AutoModel.from_config(config, attn_implementation="eager").requires_grad_(False).eval()


def config(**settings):
    return lor2c.LoR2CConfig(**dict(r=4, alpha=8, dropout=0.0, injected={1: [2, 6]}) | settings)


def randomise(model: nn.Module, std: float = 0.3) -> nn.Module:
    """As if trained: no up-projection is zero any more."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name or "lor2c_B" in name:
            nn.init.normal_(p, std=std)
    return model


def adapted(kind: str, **settings) -> PeftModel:
    return randomise(get_peft_model(base_of(kind), config(**settings))).eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).last_hidden_state


# Which modules


@each_stack
def test_q_and_v_of_every_family(stack):
    base = build(stack)
    layers = find_layers(base, layers_path(stack))[1]
    for layer in layers:
        assert tuple(find_qv(layer, base.config)) == QV[stack]


@each_stack
def test_found_again_where_lora_is_already(stack):
    base = build(stack)
    layers = find_layers(base, layers_path(stack))[1]
    add_lora(base, layers, Injection(1, 2, 4), "default", 0.0)
    assert tuple(find_qv(layers[1], base.config)) == QV[stack]


@each_stack
def test_zero_up_projection_changes_nothing(stack):
    settings = dict(layers=layers_path(stack), task_type=task_type(stack))
    if stack == "ViT":
        settings["modules_to_save"] = ["classifier"]
    model = get_peft_model(build(stack), config(**settings, spans=[], injected={0: [2, 6], 2: [3, 6]})).eval()
    b = batch(stack)
    assert torch.equal(model(**b).logits, build(stack)(**b).logits)
    out = randomise(model)(**b)
    assert not torch.allclose(out.logits, build(stack)(**b).logits)
    out.loss.backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {n for n, p in model.named_parameters() if p.requires_grad}
    body = [n for n in learned if "modules_to_save" not in n]
    assert len(body) == (6 if stack == "GPT-2" else 8) and all(".lor2c_lora_" in n for n in body)


def test_unknown_layer_names_its_linear_modules():
    base = T.AutoModel.from_config(
        T.FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"layer of falcon: pass inject_targets.*Its linear modules: self_attention\."):
        get_peft_model(base, config())
    assert not list(injected(base))


@pytest.mark.parametrize("targets", [["q_proj", "k_proj"], ["self_attn.q_proj", "self_attn.k_proj"]])
def test_targets_by_name_or_path(targets):
    model = adapted("Llama", inject_targets=targets)
    assert [path.split("layers.")[1] for path, _ in injected(model)] == ["1.self_attn.q_proj", "1.self_attn.k_proj"]


def test_targets_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"inject_targets=\['query'\] are not in the layer.*self_attn.q_proj"):
        get_peft_model(base_of("Llama"), config(inject_targets=["query"]))


# Fused projections


@each_fused
def test_rows_of_a_fused_projection(family):
    """v's rows leave the attention of their layer alone, q's do not, and k is the same to the bit."""
    model = base_of(family)
    layers = find_layers(model)[1]
    (lora,) = add_lora(model, layers, Injection(0, 3, 6), "default", 0.0)
    seen = []
    lora.register_forward_hook(lambda module, args, out: seen.append(out))

    def attention(part=None):
        if part:
            nn.init.normal_(getattr(lora.lora_B["default"], part))
        return model(input_ids=IDS, output_attentions=True).attentions[0]

    before, after_v, after_q = attention(), attention("v"), attention("q")
    assert before.shape == (2, 4, 7, 7) and torch.equal(after_v, before)
    assert all((after_q - before)[:, head].abs().max() > 1e-3 for head in range(4))
    moved = [torch.tensor([not torch.equal(a[..., i], b[..., i]) for i in range(a.shape[-1])]) for a, b in
             [(seen[0], seen[1]), (seen[1], seen[2])]]  # fmt: skip
    up = lora.lora_B["default"]
    assert moved[0].nonzero().flatten().tolist() == up.v_rows.sort().values.tolist()
    assert moved[1].nonzero().flatten().tolist() == up.q_rows.sort().values.tolist()
    heads_kv = getattr(FUSED[family], "num_key_value_heads", 4)
    assert (len(up.q_rows), len(up.v_rows), int((~moved[0] & ~moved[1]).sum())) == (32, heads_kv * 8, heads_kv * 8)


def test_head_size_of_its_own():
    """A head_dim that is not hidden_size / heads: the rows of q follow it."""
    torch.manual_seed(0)
    config = T.Phi3Config(**SIZE, num_key_value_heads=2, head_dim=16, partial_rotary_factor=1.0, **ENDS)
    layer = T.Phi3Model(config).layers[0]
    q, v = find_qv(layer, config)["self_attn.qkv_proj"]
    assert layer.self_attn.qkv_proj.out_features == 128
    assert (q.tolist(), v.tolist()) == (list(range(64)), list(range(96, 128)))


def test_gpt2_keeps_k_to_the_bit():
    model, plain = adapted("GPT-2"), base_of("GPT-2")
    x = torch.randn(2, 5, 32)
    lora, base = model.base_model.model.h[1].attn.c_attn, plain.h[1].attn.c_attn
    assert torch.equal(lora(x)[..., 32:64], base(x)[..., 32:64])
    assert not torch.isclose(lora(x), base(x)).view(2, 5, 3, 32)[:, :, [0, 2]].any()


@each_kind
def test_parameter_count_and_scaling(kind):
    """r (inputs + outputs) for q and for v, with their real sizes; alpha / r also where both are in one."""
    model = adapted(kind, injected={1: [2, 3]})
    loras = [lora for _, lora in injected(model)]
    width = model.config.hidden_size
    kv = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    v = kv * width // model.config.num_attention_heads
    trained = sum(p.numel() for lora in loras for p in lora.parameters() if p.requires_grad)
    assert trained == 2 * (width + width) + 2 * (width + v)
    assert trained == Layout(3, (), ((1, 2, 3),)).parameters(width, 4, qv=[(width, width), (width, v)])
    assert [lora.scaling["default"] for lora in loras] == [1.5] * len(loras)


# The same as PEFT's LoRA


@each_kind
def test_plain_peft_lora_with_the_same_pairs_agrees(kind):
    """PEFT's LoRA on the same modules; on a fused one at twice the rank, with FusedUp's matrix for B."""
    model = adapted(kind, spans=[])
    names = [path.removeprefix("base_model.model.") for path, _ in injected(model)]
    fused = kind != "Llama"
    settings = dict(r=4, lora_alpha=12) if fused else dict(r=2, lora_alpha=6)
    plain = get_peft_model(base_of(kind), LoraConfig(target_modules=names, fan_in_fan_out=kind == "GPT-2", **settings))
    for path, lora in injected(model):
        other = plain.get_submodule(path)
        other.lora_A["default"].weight.data = lora.lora_A["default"].weight.data
        other.lora_B["default"].weight.data = lora.lora_B["default"].weight.data
        assert type(other) is type(lora) and isinstance(lora.lora_B["default"], FusedUp) == fused
    assert torch.equal(logits(plain.eval()), logits(model))


@each_kind
def test_injected_lora_folds(kind):
    model = adapted(kind)
    want = logits(model)
    for _, lora in injected(model):
        lora.merge(safe_merge=True)
        assert lora.merged
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    for _, lora in injected(model):
        lora.unmerge()
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


@each_kind
def test_bf16_base_has_a_float32_adapter(kind):
    model = get_peft_model(base_of(kind).bfloat16(), config()).eval()
    kinds = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert kinds == {torch.float32}
    assert torch.equal(logits(model), logits(base_of(kind).bfloat16()))
    out = logits(randomise(model))
    assert out.dtype == torch.bfloat16
    wide = get_peft_model(base_of(kind), config()).eval()
    wide.load_state_dict(model.state_dict())  # the same numbers, computed in float32
    torch.testing.assert_close(out.float(), logits(wide), rtol=0.05, atol=0.05)  # bf16 has 8 bits
    out.float().square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@each_kind
def test_copies_have_their_own_parts(kind):
    model = adapted(kind)
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        randomise(twin, std=1.0)
        assert not torch.equal(logits(twin), want) and torch.equal(logits(model), want)


@pytest.mark.parametrize("fused", [False, True], ids=["q and v", "fused"])
def test_int8_base(fused, tmp_path):
    """torchao's int8 weights: LoRA trains beside them, and folds into them."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    torch.manual_seed(0)
    settings = T.Phi3Config(**SIZE, num_key_value_heads=2, **ENDS) if fused else T.LlamaConfig(**DECODER)
    T.AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    int8 = T.TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    base = T.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=int8)
    model = get_peft_model(base, config())
    assert {type(lora).__name__ for _, lora in injected(model)} == {"TorchaoLoraLinear"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    want = model.eval()(input_ids=IDS).logits.detach()
    for _, lora in injected(model):
        lora.merge()
    torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=0.1, atol=0.1)  # rounded to 8 bits again


# Several adapters


@each_kind
def test_second_adapter_on_the_same_layer(kind):
    model = adapted(kind)
    body = model.get_base_model()
    model.add_adapter("other", config(r=3, injected={1: [3, 6]}))
    randomise(model).eval()
    one = logits(model)
    assert not [n for n, p in model.named_parameters() if "other" in n and p.requires_grad]
    model.set_adapter("other")
    two = logits(model)
    assert not torch.allclose(two, one)
    model.delete_adapter("default")
    assert torch.equal(logits(model), two)
    assert {name for _, lora in injected(model) for name in lora.lora_A} == {"other"}
    model.delete_adapter("other")
    assert not list(injected(body)) and torch.equal(logits(body), logits(base_of(kind)))
    assert [n for n, _ in body.named_modules()] == [n for n, _ in base_of(kind).named_modules()]


def test_taking_one_out_switches_no_other_on():
    model = adapted("Llama")
    model.add_adapter("other", config())
    randomise(model).eval()
    model.base_model.set_layout(Layout(4, ((0, 0), (1, 1), (2, 2), (3, 3))))
    assert [lora.active_adapters for _, lora in injected(model)] == [["default"]] * 2
    assert not [n for n, p in model.named_parameters() if "other" in n and p.requires_grad]
    for n, p in model.named_parameters():
        if "other" in n:
            p.data.fill_(torch.nan)
    assert logits(model).isfinite().all()  # the other takes no part


def test_unload_leaves_the_base():
    model = adapted("GPT-2")
    assert torch.equal(logits(model.unload()), logits(base_of("GPT-2")))


# The mark


@pytest.mark.parametrize("alpha", [16, 0.1, 1 / 3, 1e-4, 1e-300, 2.5e9])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_alpha_is_exact_in_every_type(alpha, cast):
    model = getattr(get_peft_model(base_of("Llama"), config(injected={1: [2, alpha]})), cast)()
    assert {read_mark(lora.lor2c_injected["default"]) for _, lora in injected(model)} == {(Injection(1, 2, alpha), 4)}


@pytest.mark.parametrize("low_cpu", [False, True], ids=["plain", "low_cpu_mem_usage"])
@each_kind
def test_saved_and_loaded(kind, low_cpu, tmp_path):
    model = adapted(kind, injected={1: [2, 0.1]})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(kind), tmp_path, low_cpu_mem_usage=low_cpu).eval()
    assert again.base_model.layout() == model.base_model.layout()
    assert again.base_model.layout().injected == (Injection(1, 2, 0.1),)
    assert torch.equal(logits(again), logits(model))


@each_kind
def test_resumed_into_a_model_without_injections(kind, tmp_path):
    """The tensors decide, as where a Trainer resumes: it never reads the checkpoint's configuration."""
    model = adapted(kind, injected={1: [2, 0.1]})
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(base_of(kind), config(injected=None)).eval()
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert fresh.base_model.layout() == model.base_model.layout()
    assert torch.equal(logits(fresh.eval()), logits(model))
    assert all(p.requires_grad for n, p in fresh.named_parameters() if "lora_" in n)


def test_a_model_without_weights_has_marks():
    with torch.device("meta"):
        model = get_peft_model(T.AutoModel.from_config(FUSED["GPT-NeoX"]), config())
    assert model.base_model.layout().injected == (Injection(1, 2, 6),)


def test_removing_from_one_layer_leaves_the_others():
    base = base_of("Llama")
    layers = find_layers(base)[1]
    for layer in (0, 2):
        add_lora(base, layers, Injection(layer, 2, 4), "default", 0.0)
    remove_lora(base, "default", layer=0)
    assert [path.split(".")[1] for path, _ in injected(base)] == ["2", "2"]
    remove_lora(base, "nobody")
    assert len(list(injected(base))) == 2
    remove_lora(base, "default")
    assert not list(injected(base))


# Folding and configurations


@pytest.mark.parametrize("stack", ["Llama", "GPT-2", "BERT"])
def test_folding_is_refused_before_anything_is_folded(stack):
    """Injected LoRA below the first residual would be folded before the residual is met."""
    model = mixed(stack, spans=[[2, 2], [3, 3]], injected={0: [4, 8], 1: [4, 8]})
    before = {name: p.clone() for name, p in model.named_parameters()}
    for fold in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be folded"):
            fold()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(getattr(module, "merged_adapters", []) for module in model.modules())


@pytest.mark.parametrize("stack", ["Llama", "GPT-2", "BERT"])
def test_without_residuals_everything_can_be_folded(stack):
    model = mixed(stack, spans=[], injected={layer: [4, 8] for layer in range(4)})
    with torch.no_grad():
        logits = model(**batch(stack)).logits
        plain = build(stack, torch.float64)(**batch(stack)).logits
        folded = model.merge_and_unload()
        assert not any(isinstance(module, lor2c.LoR2CLayer) for module in folded.modules())
        torch.testing.assert_close(folded(**batch(stack)).logits, logits, rtol=1e-9, atol=1e-9)
    assert (logits - plain).abs().max() > 1e-5


def mixed(stack: str, **structure) -> PeftModel:
    """An adapter of this structure, whose up-projections are not zero."""
    config = lor2c.LoR2CConfig(r=8, alpha=16, dropout=0.0, task_type=task_type(stack), **structure)
    model = get_peft_model(build(stack, torch.float64), config).double().eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lor2c_B" in name or "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def test_a_configuration_belongs_to_who_wrote_it():
    """Moves change what the model holds, not what it was made with: a second model starts as the first did."""
    config = lor2c.LoR2CConfig(r=4)
    first = get_peft_model(build("Llama"), config)
    lor2c.merge_modules(first, 0, 1)
    lor2c.inject_lora(first, 3)
    assert config.spans is None and config.injected is None
    assert first.peft_config["default"].injected == {3: [2, 16]} and first.peft_config["default"].spans == [
        [0, 1],
        [2, 2],
    ]
    second = get_peft_model(build("Llama"), config)
    assert second.base_model.layout().spans == ((0, 0), (1, 1), (2, 2), (3, 3))


# Inside residuals


@pytest.mark.parametrize("stack", ["BERT", "GPT-2", "Llama", "T5 decoder"])
def test_lora_inside_residuals(stack, tmp_path):
    """A hybrid is the base at first, trains both, equals residuals and LoRA that are put on by hand, and comes back."""
    path, depth = layers_path(stack), 4
    made = dict(r=2, alpha=4, dropout=0.0, layers=path, task_type=task_type(stack))
    hybrid = get_peft_model(build(stack), lor2c.LoR2CConfig(**made, lora=[2, 6])).eval()
    layers = [(t, t) for t in range(depth)]
    assert hybrid.base_model.layout() == Layout(depth, tuple(layers), tuple((t, 2, 6) for t in range(depth)), hybrid=True)
    assert torch.equal(hybrid(**batch(stack)).logits, build(stack)(**batch(stack)).logits)
    randomise(hybrid)
    hybrid(**batch(stack)).loss.backward()
    own = [p for name, p in hybrid.named_parameters() if ".lor2c" in name]
    assert all(p.grad is not None and p.grad.any() for p in own)

    alone = lor2c.LoR2CConfig(**made, spans=[], injected={t: [2, 6] for t in range(depth)})
    by_hand = get_peft_model(build(stack), alone).eval()
    by_hand.base_model.model.load_state_dict(hybrid.base_model.model.state_dict(), strict=False)
    outside = get_peft_model(by_hand.base_model.model, lor2c.LoR2CConfig(**made), adapter_name="outside")
    pairs = pairs_of(hybrid, "default")
    for span, pair in pairs_of(outside, "outside").items():
        for p, value in zip(pair, pairs[span], strict=True):
            p.data = value.data.clone()
    for module in outside.modules():  # both at once
        if hasattr(module, "lor2c_injected"):
            module._active_adapter = ["default"]
    with torch.no_grad():
        torch.testing.assert_close(outside(**batch(stack)).logits, hybrid(**batch(stack)).logits)

    merge_modules(hybrid, 0, 1)
    hybrid.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(stack), tmp_path).eval()
    assert again.base_model.layout() == hybrid.base_model.layout() and len(again.base_model.layout().spans) == 3
    assert torch.equal(again(**batch(stack)).logits, hybrid(**batch(stack)).logits)
    with pytest.raises(ValueError, match="LoRA twice"):
        lor2c.inject_lora(hybrid, 2)


def test_what_lora_inside_cannot_be():
    for wrong in (4, [4], [0, 1], [4, 0], ["4", 8], [4, 8, 1], {"r": 4}):
        with pytest.raises(ValueError, match="lora must be"):
            lor2c.LoR2CConfig(lora=wrong)
    assert lor2c.LoR2CConfig(lora=[4, 8], spans=[[0, 1]]).layout(3).injected == tuple((t, 4, 8) for t in range(3))
