"""Every door into an adapter gives the same model: PEFT's heads, transformers' loaders, TRL's reference."""

import copy
import itertools

import accelerate
import pytest
import torch
import transformers as T
from datasets import Dataset
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from tiny import BUILD, DECODER, ENCODER, adapted, batch, build, words_and_rows
from torch.func import functional_call, grad
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, pipeline

import lor2c
from lor2c.training.surgery import inject_lora, merge_modules
from lor2c.tuners.residual import pairs_of
from lor2c.tuners.structure import layout_of

KINDS = ["residuals", "shared A", "injected", "fused", "units", "ResLoRA"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def stack_of(kind):
    return "GPT-2" if kind == "fused" else "Llama"


def trained(kind, **settings):
    """A decoder with an adapter as if trained; the injected ones are merged as well."""
    stack = stack_of(kind)
    if kind == "ResLoRA":
        targets = dict(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(build(stack), lor2c.ResLoRAConfig(**targets | settings)).eval()
    else:
        units = "stream" if kind == "units" else "paper"
        model = adapted(stack, r=4, spans=None, share=kind == "shared A", units=units, **settings)
    if kind in ("injected", "fused"):
        inject_lora(model, 2)
        merge_modules(model, 0, 1)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name or "lor2c_" in name:
            torch.nn.init.normal_(p, std=0.2)
    model(**batch(stack)).loss.backward()  # which measures the units
    model.zero_grad()
    return model


def logits(model, stack="Llama"):
    return model.eval()(**batch(stack)).logits


def saved(kind, folder):
    """A folder with a base, one with an adapter of it, and what the two give."""
    model = trained(kind)
    base = model.get_base_model()
    build(stack_of(kind)).save_pretrained(folder / "base")
    words_and_rows()[0].save_pretrained(folder / "base")
    base.config.name_or_path = model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", logits(model, stack_of(kind))


# Names


@each_kind
def test_tensors_are_named_as_lora_names_them(kind):
    model = trained(kind)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) > 4 and all(".default." in name for name in names)
    prefix = "lora_" if kind == "ResLoRA" else "lor2c_"
    assert all(f".{prefix}" in key for key in get_peft_model_state_dict(model))


# transformers


@pytest.mark.parametrize("name", [None, "default", "mine"])
@each_kind
def test_transformers_loads_the_same_model(kind, name, tmp_path):
    """By `AutoModel` from the adapter's folder (None), and by `load_adapter` under a name."""
    base, adapter, want = saved(kind, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base if name else adapter)
    if name:
        model.load_adapter(str(adapter), name)
    assert torch.equal(logits(model, stack_of(kind)), want)


@each_kind
def test_transformers_reports_nothing_missing(kind, tmp_path):
    base, adapter, _ = saved(kind, tmp_path)
    info = AutoModelForCausalLM.from_pretrained(base).load_adapter(str(adapter))
    # what units were measured on is for those who train on
    unexpected = {key for key in info.unexpected_keys if not key.endswith("lor2c_measured.default")}
    assert not info.missing_keys and not unexpected and not info.mismatched_keys


@each_kind
def test_pipeline(kind, tmp_path):
    _, adapter, want = saved(kind, tmp_path)
    words_and_rows()[0].save_pretrained(adapter)
    generate = pipeline("text-generation", model=str(adapter))
    assert torch.equal(logits(generate.model, stack_of(kind)), want)
    assert generate("w1 w2 w3", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("w1 w2 w3")


@each_kind
def test_saved_by_transformers_and_loaded_by_peft(kind, tmp_path):
    """`add_adapter` and `save_pretrained` of transformers' own model, and back in by another door."""
    _, adapter, want = saved(kind, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(adapter)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build(stack_of(kind)), tmp_path / "again")
    assert torch.equal(logits(again, stack_of(kind)), want)


# TRL


@each_kind
def test_trls_reference_is_the_trained_adapter(kind, tmp_path):
    """A policy that equals its reference has the loss log 2."""
    trl = pytest.importorskip("trl")
    tokenizer, rows = words_and_rows()
    pairs = rows.map(
        lambda row: dict(prompt="w1 w2", chosen=row["text"], rejected=row["text"][::-1]), remove_columns=["text"]
    )
    args = trl.DPOConfig(
        tmp_path, max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, logging_steps=1, max_length=24
    )
    trainer = trl.DPOTrainer(model=trained(kind), args=args, processing_class=tokenizer, train_dataset=pairs)
    reference = {n.replace(".ref.", ".default."): p for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert reference and any(p.any() for n, p in reference.items() if "B" in n)
    assert all(torch.equal(trainer.model.get_parameter(n), p) for n, p in reference.items())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("name", ["KTO", "GRPO", "RLOO"])
def test_other_trainers_take_the_same_reference(name, tmp_path):
    """Before the first step a policy that equals its reference is no way from it."""
    trl = pytest.importorskip("trl")
    tokenizer, rows = words_and_rows()
    own = dict(
        KTO=dict(max_length=24), **dict.fromkeys(["GRPO", "RLOO"], dict(num_generations=2, max_completion_length=4))
    )[name]
    how = dict(max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, logging_steps=1, beta=0.1)
    args = getattr(trl, f"{name}Config")(tmp_path, **how, **own)
    if name == "KTO":
        columns, extra = dict(completion=rows["text"], label=[True, False] * 8), {}
    else:
        columns, extra = {}, dict(reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions])
    data = Dataset.from_dict(dict(prompt=["w1 w2"] * 16, **columns))
    trainer = getattr(trl, f"{name}Trainer")(
        model=trained("injected"), args=args, processing_class=tokenizer, train_dataset=data, **extra
    )
    reference = {n.replace(".ref.", ".default."): p for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert reference and any(p.any() for n, p in reference.items() if "B" in n)
    assert all(torch.equal(trainer.model.get_parameter(n), p) for n, p in reference.items())
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["SFT", "Reward", "KTO"])
@pytest.mark.parametrize("method", ["LoR2C", "ResLoRA"])
def test_trl_makes_the_adapter_itself(method, name, tmp_path):
    """`peft_config=` in place of a model with an adapter: the adapter is trained, the base is not, and both come back."""
    trl = pytest.importorskip("trl")
    tokenizer, rows = words_and_rows()
    text = rows["text"]
    columns = dict(
        SFT=dict(text=text),
        Reward=dict(prompt=["w1"] * 16, chosen=text, rejected=text[::-1]),
        KTO=dict(prompt=["w1"] * 16, completion=text, label=[True, False] * 8),
    )[name]
    args = getattr(trl, f"{name}Config")(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        max_length=24,
        learning_rate=1e-2,
    )
    kind = dict(task_type="SEQ_CLS" if name == "Reward" else "CAUSAL_LM", dropout=0.0)
    targets = dict(target_modules=["q_proj", "v_proj"], modules_to_save=["score"] if name == "Reward" else None)
    config = lor2c.LoR2CConfig(r=2, **kind) if method == "LoR2C" else lor2c.ResLoRAConfig(r=2, **kind, **targets)
    base = build("Llama")
    if name == "Reward":
        base = T.LlamaForSequenceClassification(T.LlamaConfig(**DECODER, num_labels=1)).eval()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    trainer = getattr(trl, f"{name}Trainer")(
        model=base, args=args, processing_class=tokenizer, train_dataset=Dataset.from_dict(columns), peft_config=config
    )
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and "_B" in n and p.any()]
    assert len(moved) >= 4 and trainer.model.peft_config["default"] is config
    plain = trainer.model.unload() if name != "Reward" else None
    assert plain is None or all(torch.equal(p, before[n]) for n, p in plain.named_parameters())


# PEFT's heads


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "SEQ_CLS"])
def test_heads(task, tmp_path):
    """PEFT writes the head's name into the configuration that it was given, after the tuner was made."""
    kinds = dict(TOKEN_CLS="TokenClassification", QUESTION_ANS="QuestionAnswering", SEQ_CLS="SequenceClassification")
    base = getattr(T, f"BertFor{kinds[task]}")(T.BertConfig(**ENCODER)).eval()
    config = lor2c.LoR2CConfig(r=2, dropout=0.0, task_type=task)
    model = get_peft_model(copy.deepcopy(base), config)
    assert model.peft_config["default"] is config
    merge_modules(model, 0, 1)
    heads = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    for p in heads:
        torch.nn.init.normal_(p)
    assert heads and all(p.requires_grad for p in heads)
    model.save_pretrained(tmp_path)
    ids = dict(input_ids=torch.randint(3, 64, (2, 12)))
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(**ids)[0], model.eval()(**ids)[0])


def test_a_move_leaves_the_callers_configuration_alone():
    config = lor2c.LoR2CConfig(r=2, modules_to_save=["lm_head"])
    before = config.to_dict()
    one, other = (get_peft_model(build("Llama"), config) for _ in range(2))
    merge_modules(one, 0, 1)
    assert one.peft_config["default"].spans == [[0, 1], [2, 2], [3, 3]]
    assert config.to_dict() == before and other.peft_config["default"] is config
    assert len(other.base_model.layout().spans) == 4
    one.peft_config["default"].modules_to_save.append("other")
    assert config.modules_to_save == ["lm_head"]


# PEFT's low-level API, and loading without a copy in memory


@pytest.mark.parametrize("low_cpu", [False, True], ids=["plain", "low_cpu_mem_usage"])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_injected_as_tensors_say(kind, low_cpu):
    """The configuration knows nothing of merges and injections, the tensors do."""
    model = trained(kind)
    tensors = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    config = lor2c.LoR2CConfig(r=4, alpha=4, share=kind == "shared A")
    base = inject_adapter_in_model(config, build(stack_of(kind)), state_dict=tensors, low_cpu_mem_usage=low_cpu)
    result = set_peft_model_state_dict(base, tensors, low_cpu_mem_usage=low_cpu)
    assert not result.unexpected_keys and layout_of(base) == layout_of(model)
    assert torch.equal(logits(base, stack_of(kind)), logits(model, stack_of(kind)))
    with pytest.raises(ValueError, match="rank 4, this model has 3"):
        inject_adapter_in_model(lor2c.LoR2CConfig(r=3, share=config.share), build(stack_of(kind)), state_dict=tensors)


def test_tuner_layers_tell_their_sizes():
    layers = [m for m in trained("injected").modules() if isinstance(m, BaseTunerLayer)]
    assert {(m.in_features, m.out_features) for m in layers} == {(16, 16), (16, 8)}


@pytest.mark.parametrize("low_cpu", [False, True], ids=["plain", "low_cpu_mem_usage"])
@each_kind
def test_float32_stays_float32_on_a_bfloat16_base(kind, low_cpu, tmp_path):
    model = trained(kind)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(stack_of(kind), torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu)
    want, got = (
        {key: t for key, t in get_peft_model_state_dict(m).items() if "measured" not in key} for m in (model, again)
    )
    assert want.keys() == got.keys() and all(torch.equal(got[key], t) for key, t in want.items())
    assert all(t.dtype in (torch.float32, torch.int64) for t in got.values())


# Models whose layers differ in width


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage_of_a_swin(stage, tmp_path):
    """Width 8, 16 and 32; the model's configuration says 32."""
    shape = T.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2, 2], num_heads=[2, 2, 2], window_size=4)
    torch.manual_seed(0)
    base = T.SwinForImageClassification(shape).eval().requires_grad_(False)
    config = lor2c.LoR2CConfig(
        r=2, dropout=0.0, layers=f"swin.encoder.layers.{stage}.blocks", modules_to_save=["classifier"]
    )
    model = get_peft_model(copy.deepcopy(base), config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(pixels).logits, base(pixels).logits)
    merge_modules(model, 0, 1)
    for A, B in pairs_of(model, "default").values():
        assert A.shape == (2, 8 * 2**stage)
        torch.nn.init.normal_(B)
    model.save_pretrained(tmp_path)
    want = model(pixels).logits
    assert not torch.allclose(want, base(pixels).logits)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(pixels).logits, want)


# accelerate


@pytest.mark.parametrize("where", ["cpu", "disk"])
@each_kind
def test_offloaded(kind, where, tmp_path):
    """Weights are elsewhere until a module is called, those of the adapter as well."""
    model, stack = trained(kind), stack_of(kind)
    want = logits(model, stack)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model, stack), want)


@pytest.mark.parametrize("kind", ["residuals", "shared A", "injected", "ResLoRA"])
def test_loaded_and_dispatched(kind, tmp_path):
    """One file for base and adapter, half of the layers on disk."""
    model = trained(kind)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights():
        empty = get_peft_model(BUILD["Llama"](), model.peft_config["default"]).eval()
    layers = {f"base_model.model.model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = layers | {f"base_model.model.{name}": "cpu" for name in rest}
    file, off = str(tmp_path / "model.safetensors"), str(tmp_path / "off")
    again = accelerate.load_checkpoint_and_dispatch(empty, file, places, offload_folder=off)
    assert {p.device.type for p in again.parameters()} == {"cpu", "meta"}
    assert torch.equal(logits(again), logits(model))


# torch


@each_kind
def test_torch_func(kind):
    """Gradients by `torch.func`, and the base when its parameters are replaced by zeros."""
    model, b = trained(kind), batch(stack_of(kind))
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    got = grad(lambda replaced: functional_call(model, replaced, (), b).loss)(own)
    model(**b).loss.backward()
    assert any(g.any() for g in got.values())
    for name, g in got.items():
        torch.testing.assert_close(g, model.get_parameter(name).grad)
    nothing = {name: torch.zeros_like(p) for name, p in own.items()}
    torch.testing.assert_close(functional_call(model, nothing, (), b).logits, build(stack_of(kind))(**b).logits)


@each_kind
def test_averaged_model(kind):
    model = trained(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = AveragedModel(model)
    average.update_parameters(model)
    for p in model.parameters():
        p.data += p.requires_grad
    average.update_parameters(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.5 * p.requires_grad)
    half = logits(average.module, stack_of(kind))
    model.load_state_dict(average.module.state_dict())
    assert torch.equal(logits(model, stack_of(kind)), half)


def test_compiled_through_moves_and_switches():
    """A compiled model follows each change of structure, and each switch, as the model itself does."""
    model, b = trained("shared A"), batch("Llama")
    compiled = torch.compile(model, backend="eager")
    other = copy.deepcopy(model.peft_config["default"])

    def move():
        merge_modules(model, 0, 1)
        inject_lora(model, 3)

    def add():
        model.add_adapter("other", other)
        model.set_adapter("other")
        for name, p in model.named_parameters():
            if ".other." in name:
                torch.nn.init.normal_(p)

    def back():
        model.delete_adapter("other")
        model.set_adapter("default")

    seen = [compiled(**b).logits]
    for step in (move, add, back, model.base_model.disable_adapter_layers):
        step()
        seen.append(compiled(**b).logits)
        torch.testing.assert_close(seen[-1], model.eval()(**b).logits)
    torch.testing.assert_close(seen[3], seen[1])
    torch.testing.assert_close(seen[4], build("Llama")(**b).logits)
    assert not any(torch.allclose(a, c) for a, c in itertools.pairwise(seen))
