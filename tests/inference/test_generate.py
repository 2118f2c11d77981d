"""Generation: cached equals uncached whatever the structure, an adapter comes back from disk, and answers are answers."""

import json
import threading
from pathlib import Path

import pytest
import torch
import transformers as T
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny import DECODER, build, byte_tokenizer, decoder_folder, layers_path, task_type
from tokenizers import processors
from torch import nn

import lor2c
from lor2c.data.prompts import encode, make_prompt
from lor2c.inference.generate import (
    end_tokens,
    find_adapter,
    generate,
    load_tuned,
    prompt_tokens,
    stream,
    template_of,
)
from lor2c.tuners.residual import LoR2CLayer
from lor2c.tuners.switches import in_eval_mode

STACKS = ["Llama", "Qwen 3", "Gemma 3", "GPT-2", "T5 decoder", "T5 encoder"]
NEW = 14  # tokens: more than Gemma 3's window here, together with the prompt
IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
IDS = IDS * MASK

# What is done to an adapter before it generates


def merged(model):
    lor2c.merge_modules(model, 2, 3)
    lor2c.merge_modules(model, 1, 2)


def injected(model):
    lor2c.merge_modules(model, 0, 1)
    lor2c.inject_lora(model, 3)


STRUCTURES = {
    "one each": (dict(), None),
    "a longer one": (dict(spans=[[0, 2], [3, 3]]), None),
    "merged": (dict(), merged),
    "merged and injected": (dict(), injected),
    "shared A": (dict(share=True), None),
    "shared A, merged and injected": (dict(share=True), injected),
}


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every B away from zero, so that the adapter takes part."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lor2c_B" in name or "lora_B" in name:
            nn.init.normal_(p, std=0.7)
    return model


def adapted(stack: str, structure: str = "one each") -> nn.Module:
    """In float64, with weights that are large enough for attention to matter: at 0.02 a layer is nearly the identity."""
    config, change = STRUCTURES[structure]
    base = build(stack)
    torch.manual_seed(5)
    for p in base.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.3)
    settings = dict(r=2, alpha=4, dropout=0.0, layers=layers_path(stack), task_type=task_type(stack))
    model = get_peft_model(base, lor2c.LoR2CConfig(**settings | config))
    if change:
        change(model)
    return randomise(model).double().eval()


def run(model, rows=slice(None), **how):
    """Tokens and logits of a generation; `rows` without the padding that all of them have."""
    ids, mask = IDS[rows], MASK[rows]
    used = mask.any(0)
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    out = model.generate(
        input_ids=ids[:, used], attention_mask=mask[:, used], output_logits=True, return_dict_in_generate=True,
        **settings | how,
    )  # fmt: skip
    return out.sequences[:, -NEW:], torch.stack(out.logits)


def assert_same(one, other):
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)  # transformers hands logits out in float32
    assert torch.equal(one[0], other[0])


def check_cache(model):
    """With a cache, without, and every row alone."""
    cached = run(model)
    assert_same(cached, run(model, use_cache=False))
    for i in range(len(IDS)):
        tokens, logits = run(model, slice(i, i + 1))
        assert_same((tokens, logits), (cached[0][i : i + 1], cached[1][:, i : i + 1]))
    with model.disable_adapter():
        assert not torch.allclose(run(model)[1][0], cached[1][0], atol=1e-2)  # the adapter takes part


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("stack", STACKS)
def test_cached_is_uncached_and_a_row_alone_is_a_row_in_a_batch(stack, structure):
    check_cache(adapted(stack, structure))


def test_before_and_after_changes_of_one_model():
    model = adapted("Llama")
    check_cache(model)
    merged(model)
    check_cache(model)  # with the pairs that were kept
    lor2c.inject_lora(model, 0)
    check_cache(randomise(model).double())
    assert len(set(run(model)[0].flatten().tolist())) > 5  # no single token over and over, which anything would predict


@pytest.mark.parametrize("structure", ["a longer one", "merged", "shared A, merged and injected"])
def test_a_stash_of_an_earlier_step_would_be_seen(structure, monkeypatch):
    """The tests above can fail: hooks that in every step go on with what the prompt left are found out."""
    model, hold, prompt = adapted("Llama", structure), LoR2CLayer.hold, {}

    def hold_what_the_prompt_left(layer, start, x):
        if x.shape[1] > 1:
            prompt[layer] = x[:, -1:]
        hold(layer, start, prompt[layer] if x.shape[1] == 1 else x)

    monkeypatch.setattr(LoR2CLayer, "hold", hold_what_the_prompt_left)
    with pytest.raises(AssertionError, match="not close"):
        check_cache(model)


WAYS = {
    "static cache": (dict(cache_implementation="static"), dict()),
    "beams": (dict(num_beams=3), dict(num_beams=3)),
    "sampling": (2 * (dict(do_sample=True, temperature=0.9, top_p=0.9, top_k=0),)),
    "in chunks": (dict(prefill_chunk_size=3), dict()),
    "guesses from the prompt": (dict(prompt_lookup_num_tokens=3), dict()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stack", STACKS)
def test_other_ways_of_decoding(stack, way):
    """Each against the same, or for those that only save time against greedy decoding, without a cache."""
    model, (how, plain) = adapted(stack, "a longer one" if stack == "GPT-2" else "merged and injected"), WAYS[way]
    rows = slice(2, 3) if way in ("in chunks", "guesses from the prompt") else slice(None)  # those take one row
    found = []
    for settings in (how, dict(use_cache=False, **plain)):
        torch.manual_seed(0)
        found.append(run(model, rows, **settings)[0])
    assert torch.equal(*found)


def test_guesses_of_a_smaller_model_are_checked():
    """Assisted decoding runs several guessed tokens through the model at once; the base without adapter guesses."""
    model, guesses = adapted("Llama", "a longer one"), adapted("Llama").unload()
    assert torch.equal(run(model, slice(2, 3), assistant_model=guesses)[0], run(model, slice(2, 3))[0])


def test_compiled_with_a_static_cache():
    """Greedy and compiled in full, before and after a merge."""
    how = T.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    how._compile_all_devices = True  # elsewhere than on a GPU generate() would not compile
    model = adapted("Llama", "a longer one")
    torch._dynamo.reset()
    for change in (None, lambda: lor2c.merge_modules(model, 0, 3)):
        if change:
            change()
        torch._dynamo.utils.counters.clear()
        assert_same(run(model, cache_implementation="static", compile_config=how), run(model, use_cache=False))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def in_threads(work, n=2):
    """What `work(i)` raised or returned, for each of n threads at the same time."""
    found = [None] * n

    def one(i):
        try:
            found[i] = work(i)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_threads_generate_on_one_model():
    model = adapted("Llama", "a longer one")
    want = [run(model, slice(i, i + 1))[0] for i in range(2)]
    found = in_threads(lambda i: all(torch.equal(run(model, slice(i, i + 1))[0], want[i]) for _ in range(4)))
    assert found == [True, True]


@pytest.mark.parametrize("compiled", [[0], [2], [0, 1, 2, 3]], ids=str)
def test_some_layers_are_compiled(compiled):
    """A span may begin in a compiled layer and end in another one, or the other way round."""
    model = adapted("Llama", "a longer one")
    want = run(model)
    torch._dynamo.reset()
    for i in compiled:
        model.get_base_model().model.layers[i].compile(backend="eager")
    assert_same(run(model), want)


# From disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return decoder_folder(tmp_path_factory.mktemp("base"))


def lor2c_of(**settings) -> lor2c.LoR2CConfig:
    return lor2c.LoR2CConfig(r=2, dropout=0.1, task_type="CAUSAL_LM", **settings)


CAUSAL = dict(task_type="CAUSAL_LM")
ADAPTERS = {
    "lor2c": lambda: lor2c_of(),
    "a longer one": lambda: lor2c_of(spans=[[0, 2]], injected={3: [2, 4]}),
    "merged and injected": lambda: lor2c_of(),
    "sharelor2c": lambda: lor2c_of(share=True),
    **{
        f"reslora {kind}": lambda kind=kind: lor2c.ResLoRAConfig(r=2, shortcut=kind, pre_num=2, **CAUSAL)
        for kind in ("input", "block", "middle")
    },
    "lora": lambda: LoraConfig(r=2, **CAUSAL),
    "dora": lambda: LoraConfig(r=2, use_dora=True, **CAUSAL),
    "pissa": lambda: LoraConfig(r=2, init_lora_weights="pissa", **CAUSAL),
    "adalora": lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=10, **CAUSAL),
    "loha": lambda: LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "lokr": lambda: LoKrConfig(r=2, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "ia3": lambda: IA3Config(**CAUSAL),
    "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "no task type": lambda: LoraConfig(r=2),
}


def tuned(base: str, method: str = "lor2c") -> nn.Module:
    """A random adapter of a method on the decoder in `base`."""
    model = get_peft_model(T.AutoModelForCausalLM.from_pretrained(base), ADAPTERS[method]())
    if method == "merged and injected":
        injected(model)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("method", ADAPTERS)
def test_saved_and_loaded_gives_the_same_answers(folder, method, tmp_path):
    model = tuned(folder, method)
    model.save_pretrained(tmp_path / "run/adapter")
    asked = byte_tokenizer(), ["Add 2 and 3.", "Why?"]
    want = generate(model, *asked, max_new_tokens=8)  # in train mode, with dropout
    loaded, tokenizer = load_tuned(tmp_path / "run")
    assert not loaded.training and generate(loaded, tokenizer, asked[1], max_new_tokens=8) == want
    ids = {"input_ids": torch.tensor([prompt_tokens(tokenizer, "Why?")])}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ids).logits, model.eval()(**ids).logits, rtol=1e-5, atol=1e-5)
    base, _ = load_tuned(folder)
    with torch.no_grad():
        assert not torch.allclose(base(**ids).logits[:, -1], loaded(**ids).logits[:, -1], atol=1e-2)


def test_a_whole_model(folder, tmp_path):
    model = T.AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.neg_()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    loaded, tokenizer = load_tuned(tmp_path)
    assert find_adapter(tmp_path) == tmp_path / "model" and not loaded.training
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs no base"):
        load_tuned(tmp_path, model=folder)


def test_half_precision_is_of_the_base_only(folder, tmp_path):
    tuned(folder).save_pretrained(tmp_path)
    loaded, _ = load_tuned(tmp_path, precision="bf16", device="cpu")
    kinds = {("lor2c" in name, p.dtype) for name, p in loaded.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_where_the_base_is_looked_for(folder, tmp_path):
    """As recorded by PEFT; where that is gone, as the run was given it; and first of all, as the caller says."""
    tuned(folder).save_pretrained(tmp_path / "run/adapter")
    file = tmp_path / "run/adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/away"}))
    for broken in ("/gone/away", None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": broken}))
        with pytest.raises(
            OSError, match="'/gone/away', which is not.*--model" if broken else "does not say for which"
        ):
            load_tuned(tmp_path / "run")
        assert load_tuned(tmp_path / "run", model=folder)
    (tmp_path / "run/record.json").write_text(json.dumps({"model": folder, "hyper_parameters": {}}))
    assert load_tuned(tmp_path / "run")
    with pytest.raises(OSError, match="without a config.json"):
        load_tuned(tmp_path / "run", model=str(tmp_path))


def base_of(place: Path, **sizes) -> str:
    config = T.LlamaConfig(**{**DECODER, "vocab_size": 259, "max_position_embeddings": 512, **sizes})
    T.LlamaForCausalLM(config).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("method", ["lor2c", "sharelor2c", "reslora block", "reslora input", "lora", "ia3"])
@pytest.mark.parametrize("sizes", [dict(num_hidden_layers=2), dict(num_hidden_layers=6), dict(hidden_size=32)], ids=str)
def test_a_base_of_another_size_is_refused(folder, tmp_path, method, sizes):
    tuned(folder, method).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit the base") as error:
        load_tuned(tmp_path, model=base_of(tmp_path / "other", **sizes))
    assert str(tmp_path / "other") in str(error.value) and "\n" not in str(error.value)


def changed(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none of them"):
        load_tuned(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_tuned(tmp_path / "none")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has not finished"):
        load_tuned(tmp_path / "run")
    tuned(folder).save_pretrained(tmp_path)
    for wrong, message in [
        (dict(precision="fp8"), "unknown precision 'fp8'"),
        (dict(device="tpu"), "unknown device 'tpu'"),
        (dict(quantize="2bit"), "unknown quantize '2bit'"),
        (dict(model="minilm"), "is no decoder"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tuned(tmp_path, **wrong)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' is not there"):
            load_tuned(tmp_path, device="cuda")
    changed(tmp_path / "adapter_config.json", task_type="SEQ_CLS")
    weights = tmp_path / "adapter_model.safetensors"
    with pytest.raises(ValueError, match="saved with task_type = 'CAUSAL_LM', and adapter_config.json has 'SEQ_CLS'"):
        load_tuned(tmp_path)
    save_file(load_file(weights), weights, {"format": "pt"})  # on purpose
    with pytest.raises(ValueError, match="is for task_type SEQ_CLS, not CAUSAL_LM"):
        load_tuned(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        load_tuned(tmp_path)


def test_the_template_of_a_run(folder, tmp_path, monkeypatch):
    places = [tmp_path / "run/adapter", tmp_path / "run/checkpoints/checkpoint-3"]
    for place in places:
        tuned(folder).save_pretrained(place)
        assert template_of(place) == "alpaca"
    (tmp_path / "run/run.json").write_text(json.dumps({"template": "chat", "model": folder}))
    assert template_of(places[1]) == "chat"
    (tmp_path / "run/record.json").write_text(json.dumps({"hyper_parameters": {"template": "chat"}}))
    assert template_of(places[0]) == template_of(tmp_path / "run") == "chat"
    monkeypatch.chdir(places[0])
    assert template_of(".") == "chat"
    (tmp_path / "run/record.json").write_text("[")
    with pytest.raises(ValueError, match="record.json is damaged"):
        template_of(places[0])


# Prompts and answers


@pytest.fixture(scope="module")
def model(folder) -> nn.Module:
    return tuned(folder, "a longer one").eval()


def with_marks() -> T.PreTrainedTokenizerBase:
    """A tokenizer that puts a start and an end mark around every text."""
    tokenizer = byte_tokenizer()
    marks = [("<s>", 1), ("</s>", 2)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return tokenizer


def talker() -> T.PreTrainedTokenizerBase:
    """A tokenizer with a chat template, whose turns end in a token of their own."""
    tokenizer = with_marks()  # which a chat template does without
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>", "</turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("input", ["", "2 and 3"])
@pytest.mark.parametrize("kind, template", [(byte_tokenizer, "alpaca"), (with_marks, "alpaca"), (talker, "chat")])
def test_a_prompt_has_the_tokens_of_training(kind, template, input):
    tokenizer = kind()
    texts = [make_prompt(tokenizer, "Add.", input, template, response) for response in (None, "It is 5.")]
    trained = encode(tokenizer, *texts, 512, template)
    tokens = prompt_tokens(tokenizer, "Add.", input, template)
    assert trained["input_ids"][: len(tokens)] == tokens and trained["labels"].count(-100) == len(tokens)
    assert (tokens[0] == 1) == (kind is with_marks) and tokens[-1] != 2


def test_a_text_as_it_is():
    assert with_marks().decode(prompt_tokens(with_marks(), "Roses are", template="none")) == "<s>Roses are"
    with pytest.raises(ValueError, match="in a template only"):
        prompt_tokens(byte_tokenizer(), "Roses are", "red", "none")
    with pytest.raises(ValueError, match="unknown template 'vicuna': choose one of alpaca, chat, none"):
        prompt_tokens(byte_tokenizer(), "Roses are", template="vicuna")


def test_a_batch_is_its_rows(model):
    asked = ["Why?", "Say something rather long about nothing in particular.", "Add."]
    together = generate(model, byte_tokenizer(), asked, max_new_tokens=10)
    alone = [generate(model, byte_tokenizer(), [one], max_new_tokens=10)[0] for one in asked]
    assert together == alone and len(set(alone)) == 3
    prompt = make_prompt(byte_tokenizer(), "Why?")
    ids = torch.tensor([prompt_tokens(byte_tokenizer(), "Why?")])
    whole = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert byte_tokenizer().decode(whole[0], skip_special_tokens=True) == prompt + together[0]


def test_an_answer_ends_at_any_of_the_end_tokens(model):
    """Of the model's configuration here: whichever token comes fourth is made one. The other row goes on."""
    asked = [byte_tokenizer(), ["Why?", "Add."]]
    ids = torch.tensor([prompt_tokens(byte_tokenizer(), "Why?")])
    tokens = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ].tolist()
    stop = tokens[3]
    before, other = generate(model, *asked, max_new_tokens=10)
    kept = model.generation_config.eos_token_id
    for named in (stop, [kept, stop]):
        model.generation_config.eos_token_id = named
        try:
            assert end_tokens(model, byte_tokenizer()) == sorted({2, stop})
            short, long = generate(model, *asked, max_new_tokens=10)
        finally:
            model.generation_config.eos_token_id = kept
        assert short == byte_tokenizer().decode(tokens[: tokens.index(stop)]) != before
        assert other.startswith(long)


def test_a_turn_ends_where_the_template_ends_it(tmp_path):
    base = T.LlamaForCausalLM(T.LlamaConfig(**{**DECODER, "vocab_size": 261, "max_position_embeddings": 512}))
    tokenizer = talker()
    end = tokenizer.convert_tokens_to_ids("</turn>")
    assert end_tokens(base, tokenizer, "chat") == [2, end] and end_tokens(base, tokenizer) == [2]
    base.lm_head.weight.data.zero_()
    base.lm_head.bias = nn.Parameter(torch.zeros(261))
    base.lm_head.bias.data[end] = 1  # the model has nothing to say
    assert generate(base, tokenizer, ["Why?"], template="chat", max_new_tokens=5) == [""]
    ids = base.generate(
        input_ids=torch.tensor([[5]]), generation_config=T.GenerationConfig(max_new_tokens=5, eos_token_id=2)
    )
    assert ids.tolist() == [[5, *[end] * 5]]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_tokens(base, tokenizer, "chat") == [2]  # a line break ends nothing


def test_sampling(model):
    asked, how = (model, byte_tokenizer(), ["Why?", "Add."]), dict(max_new_tokens=12)
    greedy, torch_state = generate(*asked, **how), torch.get_rng_state()
    one, again, other = (generate(*asked, temperature=1.5, seed=seed, **how) for seed in (1, 1, 2))
    assert one == again != other and greedy not in (one, other)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert generate(*asked, temperature=1.5, **how) != generate(*asked, temperature=1.5, **how)
    assert generate(*asked, temperature=1.5, top_p=1e-6, seed=1, **how) == greedy  # the likeliest token alone
    assert generate(*asked, temperature=1e-3, seed=1, **how) == greedy
    torch.manual_seed(1)
    assert generate(*asked, temperature=1.5, **how) == one  # a seed is torch's


def test_a_models_own_ideas_about_sampling_are_overruled(model):
    asked = (model, byte_tokenizer(), ["Why?"])
    want = [generate(*asked, max_new_tokens=12, seed=1, temperature=x) for x in (0.0, 1.5)]
    kept = model.generation_config
    own = dict(do_sample=True, temperature=0.6, top_p=0.5, top_k=1, repetition_penalty=5.0, num_beams=2)
    model.generation_config = T.GenerationConfig(**own, eos_token_id=2)
    try:
        assert want == [generate(*asked, max_new_tokens=12, seed=1, temperature=x) for x in (0.0, 1.5)]
    finally:
        model.generation_config = kept


def test_a_stream_prints_what_it_returns(model, capsys):
    answer = stream(model, byte_tokenizer(), "Why?", max_new_tokens=12)
    assert (
        capsys.readouterr().out == answer + "\n"
        and answer == generate(model, byte_tokenizer(), ["Why?"], max_new_tokens=12)[0]
    )
    pieces = T.TextIteratorStreamer(byte_tokenizer(), skip_prompt=True, skip_special_tokens=True)
    [[same]] = in_threads(lambda _: generate(model, byte_tokenizer(), ["Why?"], max_new_tokens=12, streamer=pieces), 1)
    assert "".join(pieces) == answer == same


def test_every_module_goes_back_to_its_mode(folder):
    model = tuned(folder, "merged and injected").train()
    model.base_model.model.lm_head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before
    answers = [generate(model, byte_tokenizer(), ["Why?"], max_new_tokens=12) for _ in range(2)]
    assert answers[0] == answers[1] == generate(model.eval(), byte_tokenizer(), ["Why?"], max_new_tokens=12)


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        (dict(prompts=[]), ValueError, "at least one prompt"),
        (dict(prompts="Why?"), TypeError, "pass \\['Why"),
        (dict(prompts=["Why?", " \n"]), ValueError, "must have some text"),
        (dict(max_new_tokens=0), ValueError, "at least 1, found 0"),
        (dict(max_new_tokens=1.5), ValueError, "whole number of at least 1, found 1.5"),
        (dict(temperature=-0.1), ValueError, "found -0.1"),
        (dict(temperature=float("nan")), ValueError, "found nan"),
        (dict(temperature=1.0, top_p=0.0), ValueError, "top_p must be above 0"),
        (dict(temperature=1.0, top_p=1.1), ValueError, "at most 1, found 1.1"),
        (dict(top_p=0.9), ValueError, "give a temperature above 0"),
        (dict(prompts=["Why?", "x" * 300]), ValueError, "prompt 2 has .* more than the model's 512"),
        (dict(max_new_tokens=512), ValueError, "prompt 1 has"),
        (dict(template="chat"), ValueError, "no chat template"),
        (dict(model=build("BERT")), TypeError, "a causal language model is needed"),
        (dict(model=build("T5 decoder")), TypeError, "a causal language model is needed, found T5"),
        (dict(prompts=["a", "b"], streamer=T.TextStreamer(byte_tokenizer())), ValueError, "a stream takes one prompt"),
    ],
)
def test_what_cannot_be_asked(model, monkeypatch, changes, kind, message):
    asked = dict(model=model, tokenizer=byte_tokenizer(), prompts=["Why?"]) | changes
    if callable(getattr(asked["model"], "generate", None)):
        monkeypatch.setattr(asked["model"], "generate", lambda **_: pytest.fail("it was computed"), raising=False)
    with pytest.raises(kind, match=message):
        generate(**asked)


def test_as_many_tokens_as_there_is_room_for(model):
    length = len(prompt_tokens(byte_tokenizer(), "Why?"))
    assert generate(model, byte_tokenizer(), ["Why?"], max_new_tokens=512 - length)
