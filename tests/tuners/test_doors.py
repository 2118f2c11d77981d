"""Every door into an adapter gives the same model: PEFT's heads, transformers' loaders, TRL's reference."""

import copy

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import ENCODER, adapted, batch, build, words_and_rows
from transformers import AutoModelForCausalLM, pipeline

import lor2c
from lor2c.training.surgery import inject_lora, merge_modules

KINDS = ["residuals", "shared A", "injected", "fused", "ResLoRA"]
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
        model = adapted(stack, r=4, spans=None, share=kind == "shared A", **settings)
    if kind in ("injected", "fused"):
        inject_lora(model, 2)
        merge_modules(model, 0, 1)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name or "lor2c_" in name:
            torch.nn.init.normal_(p, std=0.2)
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
    assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys


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
    pairs = rows.map(lambda row: dict(prompt="w1 w2", chosen=row["text"], rejected=row["text"][::-1]), remove_columns=["text"])
    args = trl.DPOConfig(
        tmp_path, max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, logging_steps=1, max_length=24
    )
    trainer = trl.DPOTrainer(model=trained(kind), args=args, processing_class=tokenizer, train_dataset=pairs)
    reference = {n.replace(".ref.", ".default."): p for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert reference and any(p.any() for n, p in reference.items() if "B" in n)
    assert all(torch.equal(trainer.model.get_parameter(n), p) for n, p in reference.items())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


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
