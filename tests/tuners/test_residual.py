"""The tuner against the equation written out, and what reads badly in a notebook: threads, damage, wrong bases."""

import copy
import importlib.util
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import dispatch_model
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForSequenceClassification,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny import adapted, batch, build, gradients, written_out
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

import lor2c
from lor2c.maths.layout import Layout
from lor2c.training.scores import scores_of
from lor2c.tuners import residual

ONE_LAYER, LONGER = [[0, 0], [1, 1], [2, 2], [3, 3]], [[0, 0], [1, 3]]


def pairs(model):
    """{(start, end): (A, B, scaling)} of a model's default adapter, as leaves that need gradients."""
    found = {}
    for module in model.modules():
        if isinstance(module, lor2c.LoR2CLayer):
            A, B = module.lor2c_A["default"].weight, module.lor2c_B["default"].weight
            leaves = [t.detach().clone().requires_grad_() for t in (A, B)]
            found[module.start["default"], module.end] = (*leaves, module.scaling["default"])
    return found


def roberta(model, base, b, residuals):
    h = base.roberta.embeddings(input_ids=b["input_ids"])
    mask = create_bidirectional_mask(config=base.config, inputs_embeds=h, attention_mask=b["attention_mask"])
    layers = base.roberta.encoder.layer
    states = written_out(h, lambda t, h: layers[t](h, mask), 4, residuals)
    head = model.base_model.model.classifier.modules_to_save["default"]
    return states, head(states[-1]), states


def llama(model, base, b, residuals):
    body, h = base.model, base.model.embed_tokens(b["input_ids"])
    positions = torch.arange(h.shape[1])[None]
    mask = create_causal_mask(
        config=base.config,
        inputs_embeds=h,
        attention_mask=b["attention_mask"],
        past_key_values=None,
        position_ids=positions,
    )
    angles = body.rotary_emb(h, positions)
    states = written_out(
        h, lambda t, h: body.layers[t](h, attention_mask=mask, position_embeddings=angles), 4, residuals
    )
    last = body.norm(states[-1])
    return states, base.lm_head(last), [*states[:-1], last]  # transformers records the normed last state


@pytest.mark.parametrize("spans", [ONE_LAYER, LONGER], ids=["one layer", "longer"])
@pytest.mark.parametrize(
    "stack, reference, dtype, tolerance",
    [
        ("RoBERTa", roberta, torch.float64, 1e-9),
        ("Llama", llama, torch.float64, 1e-9),
        ("Llama", llama, torch.float32, 1e-5),
    ],
    ids=["RoBERTa-float64", "Llama-float64", "Llama-float32"],
)
def test_written_out(stack, reference, dtype, tolerance, spans):
    """Logits, recorded hidden states and gradients equal the equation's."""
    b = batch(stack, dtype=dtype)
    b.pop("labels")
    model, base = adapted(stack, dtype, spans=spans, alpha=6), build(stack, dtype)
    for n, p in model.named_parameters():
        if "lor2c_" in n:
            p.data = p.data.to(dtype)
    residuals = pairs(model)
    assert sorted(residuals) == sorted(map(tuple, spans)) and {r[2] for r in residuals.values()} == {3.0}
    _, logits, recorded = reference(model, base, b, residuals)
    out = model(**b, output_hidden_states=True)
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.logits, logits, **close)
    torch.testing.assert_close(list(out.hidden_states), recorded, **close)

    logits.square().sum().backward()
    out.logits.square().sum().backward()
    for module in model.modules():
        if isinstance(module, lor2c.LoR2CLayer):
            A, B, _ = residuals[module.start["default"], module.end]
            torch.testing.assert_close(module.lor2c_A["default"].weight.grad, A.grad, **close)
            torch.testing.assert_close(module.lor2c_B["default"].weight.grad, B.grad, **close)
            assert A.grad.abs().max() > 100 * tolerance


def test_layers_below_the_first_residual_get_no_backward():
    """Nothing under the end of the first span is on the tape: its layers' outputs need no gradient."""
    model = adapted("BERT", spans=[[0, 1], [2, 3]])
    states = model(**batch("BERT"), output_hidden_states=True).hidden_states
    assert [h.requires_grad for h in states] == [False, False, True, True, True]


def test_dropout_only_in_training():
    """The residual's input is dropped with the given probability while training, and not in eval mode."""
    b, model = batch("Llama"), adapted("Llama", dropout=0.5)
    assert torch.equal(model(**b).logits, model(**b).logits)
    model.train()
    torch.manual_seed(0)
    first = model(**b).logits
    assert not torch.equal(first, model(**b).logits)
    torch.manual_seed(0)
    assert torch.equal(first, model(**b).logits)


def test_threads_do_not_mix():
    """Forwards of several threads through one model keep their inputs apart, spans of three layers included."""
    model = adapted("Llama")
    batches = [batch("Llama", seed) for seed in range(6)]
    with torch.no_grad():
        want = [model(**b).logits for b in batches]
        wrong = []

        def work(i):
            for _ in range(20):
                with torch.no_grad():
                    if not torch.allclose(model(**batches[i]).logits, want[i], atol=1e-6):
                        wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert not wrong


def test_a_span_that_lost_its_start_is_an_error():
    """A wrapper that runs one layer alone, as some recomputation does, is refused instead of silently wrong."""
    model = adapted("BERT")
    layer = model.base_model.model.bert.encoder.layer[3]
    with pytest.raises(RuntimeError, match=r"ran without layer 1.*gradient_checkpointing_enable"):
        layer(torch.randn(1, 3, 16))


def test_replicas_of_data_parallel_are_refused():
    """nn.DataParallel's replicas have empty parameter dictionaries: an adapter would be left out without a word."""
    model = adapted("BERT", spans=ONE_LAYER)
    model.base_model.model.bert.encoder.layer[0]._is_replica = True  # what replicate() sets
    with pytest.raises(RuntimeError, match="torchrun or accelerate launch"):
        model(**batch("BERT"))


def saved(tmp_path, **config):
    model = adapted("BERT", **config)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter" / "adapter_model.safetensors"


def bert(**changes):
    return BertForSequenceClassification(BertConfig(**{**build("BERT").config.to_dict(), **changes}))


def test_tensors_decide_the_structure(tmp_path):
    """Loading into a model set up with other spans takes over the checkpoint's: what Trainer's resume does."""
    model, _ = saved(tmp_path)
    other = adapted("BERT", spans=None)
    other.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert other.peft_config["default"].spans == LONGER
    assert torch.equal(other(**batch("BERT")).logits, model(**batch("BERT")).logits)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_trainer_fetches_the_best_structure(tmp_path):
    """load_best_model_at_end puts back the spans of the best checkpoint, not only its weights."""
    model = adapted("BERT", spans=LONGER)
    rows = [{k: v[i] for k, v in batch("BERT", seed).items()} for seed in range(4) for i in range(2)]
    args = TrainingArguments(
        tmp_path, num_train_epochs=1, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    want = model.eval()(**batch("BERT")).logits
    model.base_model.set_layout(Layout(4, ONE_LAYER))  # as if the structure had changed after the best epoch
    assert not torch.equal(model.eval()(**batch("BERT")).logits, want)
    trainer._load_best_model()
    assert model.peft_config["default"].spans == LONGER
    assert torch.equal(model.eval()(**batch("BERT")).logits, want)


def test_a_new_layout_keeps_equal_spans():
    """A residual whose span stays keeps its pair; a new one starts at zero; unused hooks go."""
    model = adapted("BERT", spans=ONE_LAYER)
    before = {span: (A.detach().clone(), B.detach().clone()) for span, (A, B, _) in pairs(model).items()}
    model.base_model.set_layout(Layout(4, ((0, 0), (1, 2), (3, 3))))
    after = pairs(model)
    assert sorted(after) == [(0, 0), (1, 2), (3, 3)]
    for span in [(0, 0), (3, 3)]:
        assert all(torch.equal(x, y) for x, y in zip(before[span], after[span][:2], strict=True))
    assert not after[1, 2][1].any()
    layers = model.base_model.model.bert.encoder.layer
    assert not hasattr(layers[1], "lor2c")
    assert [sum(isinstance(h, lor2c.tuners.residual._AddResidual) for h in m._forward_hooks.values()) for m in layers] == [
        1,
        0,
        1,
        1,
    ]
    assert [len(m._forward_pre_hooks) for m in layers] == [0, 1, 0, 0]
    model(**batch("BERT")).loss.backward()
    assert {n for n, g in gradients(model).items() if "lor2c_B" in n and g.any()} == {
        n for n, _ in model.named_parameters() if "lor2c_B" in n
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_hidden_layers=6), "a depth of 4, this model has 6"),
        (dict(num_hidden_layers=2), r"span \[1, 3\] is not in a model of 2 layers"),
        (dict(hidden_size=32), "a width of 16, this model has 32"),
    ],
    ids=["deeper", "shallower", "wider"],
)
def test_another_base_is_refused(tmp_path, changes, message):
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(bert(**changes), tmp_path / "adapter")


def test_another_family_and_another_rank_are_refused(tmp_path):
    state = get_peft_model_state_dict(adapted("BERT"))
    state = {k: v for k, v in state.items() if "lor2c_" in k}
    with pytest.raises(ValueError, match="layers at 'bert.encoder.layer', this model has 'model.layers'"):
        set_peft_model_state_dict(adapted("Llama"), state)
    with pytest.raises(ValueError, match="rank 2, this model has 3"):
        set_peft_model_state_dict(adapted("BERT", r=3, task_type=None), state)
    with pytest.raises(ValueError, match="no LoR2C tensors"):
        set_peft_model_state_dict(adapted("Llama"), {"base_model.model.lora_A.weight": torch.zeros(1)})


@pytest.mark.parametrize("part", ["lor2c_A", "lor2c_B", "lor2c_span"])
def test_a_missing_tensor_is_damage(tmp_path, part):
    _, file = saved(tmp_path)
    tensors = {k: v for k, v in load_file(file).items() if f"3.lor2c.{part}" not in k}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"damaged: {part} of layer bert.encoder.layer.3 is missing"):
        PeftModel.from_pretrained(build("BERT"), tmp_path / "adapter")


def test_card_is_written_once_and_for_named_adapters(tmp_path):
    model = adapted("BERT")
    model.add_adapter("other", lor2c.LoR2CConfig(r=2, task_type="SEQ_CLS"))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import lor2c") == 1
    body = card.split("---", 2)[2].strip()
    assert body.startswith("```python\nimport lor2c")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("# My own notes\n")
    model.peft_config["default"].save_pretrained(mine / "default")
    assert (mine / "README.md").read_text() == "# My own notes\n"  # not a card of PEFT's: left alone


def test_peft_without_lor2c_says_no(tmp_path):
    """What a reader sees who forgot the import: the reason why the card begins with it."""
    saved(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path / 'adapter')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "LOR2C" in done.stderr


def test_plain_pytorch_blocks():
    """Layers that are not from transformers work once they are named."""

    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.TransformerEncoder(
                torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 3
            )

        def forward(self, x):
            return self.blocks(x)

    base = Blocks().eval().requires_grad_(False)
    with pytest.raises(ValueError, match=r"found no stacks.*layers='blocks.layers'"):
        get_peft_model(base, lor2c.LoR2CConfig())
    model = get_peft_model(base, lor2c.LoR2CConfig(r=2, layers="blocks.layers", spans=[[0, 1]])).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():  # so that both runs take PyTorch's fused path
        with model.disable_adapter():
            want = model(x)
        assert torch.equal(model(x), want)
    layer = model.base_model.model.blocks.layers[1].lor2c
    torch.nn.init.normal_(layer.lor2c_B["default"].weight)
    model(x).sum().backward()
    assert layer.lor2c_A["default"].weight.grad.any() and not torch.equal(model(x), want)


def test_layer_status_of_peft():
    """PEFT's own inspection understands the layers."""
    model = adapted("Llama")
    assert len(model.get_layer_status()) == len(LONGER)
    status = model.get_model_status()
    assert status.enabled and status.num_adapter_layers == len(LONGER) and status.trainable_params > 0


def test_less_is_kept_for_backward_than_with_lora():
    """The benchmark's other figure is not a time, so it can be asserted: activations that autograd keeps."""
    spec = importlib.util.spec_from_file_location("step", Path(__file__).parents[2] / "benchmarks" / "step.py")
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    result = step.measure(rounds=1, batch=2, length=16)
    assert result["lor2c"]["bytes"] < 0.9 * result["lora"]["bytes"]


def kept(config) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a forward of a bf16 decoder with checkpointing leaves in memory, and the gradients."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2, vocab_size=64)
    model = get_peft_model(transformers.LlamaModel(transformers.LlamaConfig(**sizes)).bfloat16(), config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, p in model.named_parameters():
        if "lor2c_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    torch.manual_seed(1)
    with torch.profiler.profile(profile_memory=True) as seen:
        out = model(input_ids=torch.arange(64)[None].expand(4, -1)).last_hidden_state
    out.float().square().mean().backward()
    return sum(event.self_cpu_memory_usage for event in seen.events()), gradients(model)


def test_checkpointing_keeps_no_more_than_with_lora(monkeypatch):
    """The input in the pair's type, and a dropout mask, are computed again; the gradients are the same bits."""
    config = lor2c.LoR2CConfig(r=4, dropout=0.1, spans=[[0, 0], [1, 2], *([i, i] for i in range(3, 8))])
    lora, _ = kept(LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    less, found = kept(config)
    forward = lor2c.LoR2CLayer.forward
    monkeypatch.setattr(lor2c.LoR2CLayer, "forward", lambda self, h, x, recompute=False: forward(self, h, x))
    more, wanted = kept(config)
    assert less < 1.1 * lora < 0.7 * more
    assert len(wanted) == 14 and all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_a_base_in_fp8_gets_a_pair_that_can_be_trained():
    """FP8 counts as floating in torch, and is for weights only."""
    base = build("Llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.to(torch.float8_e4m3fn)
    assert next(base.model.layers[0].parameters()).dtype == torch.float8_e4m3fn
    model = get_peft_model(base, lor2c.LoR2CConfig(r=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_an_offloaded_base_is_adapted_where_it_computes(tmp_path):
    """Layers on the disk are meta tensors between forwards; a pair has to be where their hooks bring them."""
    whole, part = build("Llama"), build("Llama")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    part = dispatch_model(part, places, main_device="cpu", offload_dir=tmp_path)
    assert part.model.layers[1].mlp.up_proj.weight.is_meta
    b, answers = batch("Llama"), []
    for base in (whole, part):
        torch.manual_seed(0)
        model = get_peft_model(base, lor2c.LoR2CConfig(r=2, dropout=0.0, spans=[[0, 0], [1, 1], [2, 3]]))
        for _, (_, B) in sorted(residual.pairs_of(model, "default").items()):
            torch.nn.init.normal_(B)
        answers.append(model(**b))
    torch.testing.assert_close(answers[1].logits, answers[0].logits)
    answers[1].loss.backward()
    assert len(gradients(model)) == 6


def test_names_of_adapters_that_are_not_there():
    """Without a name it is the active adapter that is meant; another than those that there are is refused."""
    model = get_peft_model(build("Llama"), lor2c.LoR2CConfig(r=2, spans=[[0, 0], [1, 1]]), adapter_name="mine")
    assert len(scores_of(model)) == 2 and model.base_model.layout() == model.base_model.layout("mine")
    model.base_model.set_layout(Layout(4, ((0, 1),)))
    assert list(scores_of(model, adapter_name="mine")) == [0]
    for attempt in (scores_of, lambda m, adapter_name: m.base_model.set_layout(Layout(4, ((0, 0),)), adapter_name)):
        with pytest.raises(ValueError, match="no LoR2C adapter 'theirs'"):
            attempt(model, adapter_name="theirs")
    with pytest.raises(ValueError, match="no LoR2C adapter: make one"):
        scores_of(build("Llama"))


def named(model, name, spans):
    model.add_adapter(name, lor2c.LoR2CConfig(r=2, dropout=0.0, spans=spans))


def test_layers_agree_after_the_active_adapter_is_deleted():
    """PEFT lets each layer choose the next adapter for itself; a model must run one of them, and train that one."""
    model = adapted("Llama", task_type=None, spans=[[0, 0], [3, 3]])
    named(model, "b", [[0, 0], [1, 1]])
    named(model, "c", [[0, 0], [3, 3]])
    model.delete_adapter("default")
    active = model.active_adapters
    found = [m for m in model.modules() if isinstance(m, lor2c.LoR2CLayer)]
    assert len(active) == 1 and all(m.active_adapters == active for m in found)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == set(active)


def test_an_adapter_added_while_switched_off_is_off():
    b, model = batch("Llama"), adapted("Llama", spans=[[0, 0]])
    base = build("Llama")(**b).logits
    with model.disable_adapter():
        named(model, "other", [[2, 2]])
        model.set_adapter("other")
        layer = model.base_model.model.model.layers[2].lor2c
        torch.nn.init.normal_(layer.lor2c_B["other"].weight)
        assert torch.equal(model(**b).logits, base)
    assert not torch.equal(model(**b).logits, base)


def test_models_that_skip_layers_are_refused_for_longer_spans():
    """With layerdrop the start of a span may not run, or an old input may be waiting."""
    tiny = dict(hidden_size=16, ffn_dim=32, num_hidden_layers=4, num_attention_heads=2, word_embed_proj_dim=16)
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=64, layerdrop=0.5, **tiny))
    with pytest.raises(ValueError, match=r"layerdrop=0.5.*layerdrop=0, or use spans of one layer"):
        get_peft_model(opt, lor2c.LoR2CConfig(spans=[[0, 2]]))
    model = get_peft_model(opt, lor2c.LoR2CConfig())
    with pytest.raises(ValueError, match="layerdrop"):
        model.base_model.set_layout(Layout(4, ((0, 2),)))
    with pytest.raises(ValueError, match="and no merges"):
        lor2c.IMCallback(1, 0).begin(model, 24, 3)
    lor2c.IMCallback(0, 1).begin(model, 24, 3)


def test_the_stack_that_is_adapted_is_asked_for_layerdrop():
    sizes = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.M2M100Config(encoder_layerdrop=0.05, decoder_layerdrop=0.0, **sizes, **heads)
    base = transformers.M2M100ForConditionalGeneration(config)
    get_peft_model(copy.deepcopy(base), lor2c.LoR2CConfig(layers="model.decoder.layers", spans=[[0, 1]]))
    with pytest.raises(ValueError, match="load the model with encoder_layerdrop=0"):
        get_peft_model(base, lor2c.LoR2CConfig(layers="model.encoder.layers", spans=[[0, 1]]))


def test_a_forward_that_failed_half_way_leaves_a_model_that_copies():
    """The input that was kept for a span does not travel, and the next forward is right."""
    b, model = batch("BERT"), adapted("BERT")
    want = model(**b).logits
    layer = model.base_model.model.bert.encoder.layer[2]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**b)
    handle.remove()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(twin(**b).logits, want)


def test_plain_load_state_dict_refuses_another_structure():
    """Loaders that go past PEFT must not put the tensors of [1..3] into a residual of [3..3] without a word."""
    state = adapted("BERT").state_dict()
    with pytest.raises(RuntimeError, match=r"saved with \[start, end, depth\] \[1, 3, 4\]; call set_layout"):
        adapted("BERT", spans=[[0, 0], [3, 3]]).load_state_dict(state)
    adapted("BERT").load_state_dict(state)


@pytest.mark.parametrize("spans", [LONGER, None], ids=["as saved", "from the tensors"])
def test_low_memory_loading(tmp_path, spans):
    """low_cpu_mem_usage starts on the meta device; nothing may stay there, whoever decides the structure."""
    model, file = saved(tmp_path)
    if spans:
        loaded = PeftModel.from_pretrained(build("BERT"), file.parent, low_cpu_mem_usage=True).eval()
    else:
        config = lor2c.LoR2CConfig.from_pretrained(file.parent)
        config.spans = None
        loaded = PeftModelForSequenceClassification(build("BERT"), config, low_cpu_mem_usage=True).eval()
        set_peft_model_state_dict(loaded, load_file(file), low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(loaded(**batch("BERT")).logits, model(**batch("BERT")).logits)
