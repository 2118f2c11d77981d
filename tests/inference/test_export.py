"""Exported folders: other processes, without lor2c, get the same numbers from them; wrong input leaves nothing behind."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from conftest import refused
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import DECODER, STACKS, adapted, batch, build, byte_tokenizer, decoder_folder, with_values

import lor2c
from lor2c.cli.main import main
from lor2c.inference.export import export
from lor2c.tuners.residual import residuals

STRUCTURES = {
    "spans": dict(),
    "shared": dict(share=True, spans=[[0, 1], [2, 2], [3, 3]]),
    "injected": dict(spans=[[0, 0], [2, 3]], injected={1: [2, 4]}),
    "hybrid": dict(spans=[[0, 1], [3, 3]], lora=[2, 4]),
    "ranks": dict(spans=None, ranks={0: 1, 2: 5}, alpha=3),
    "all injected": dict(spans=[], injected={t: [2, 4] for t in range(4)}),
}
AUTO = {**dict.fromkeys(("GPT-2", "Llama", "Qwen 3", "Gemma 3"), "CausalLM"), "ViT": "ImageClassification"}
AUTO |= dict.fromkeys(("T5 encoder", "T5 decoder"), "Seq2SeqLM")
GREEDY = dict(max_new_tokens=6, do_sample=False)


def asked_of(stack: str) -> dict:
    inputs = batch(stack)
    if AUTO.get(stack) == "CausalLM":  # the first row is padded on its left
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :4] = 0
    generations = [
        GREEDY,
        GREEDY | {"cache_implementation": "static", "disable_compile": True},
        GREEDY | {"use_cache": False},
    ]
    auto = f"AutoModelFor{AUTO.get(stack, 'SequenceClassification')}"
    return dict(auto=auto, batch=inputs, generations=generations if AUTO.get(stack) == "CausalLM" else [])


def read_elsewhere(place: Path, asked: dict[str, dict]) -> dict[str, dict]:
    torch.save(asked, place / "asked.pt")
    worker = Path(__file__).parents[1] / "workers/exported.py"
    done = subprocess.run([sys.executable, worker, place], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(place / "read.pt", weights_only=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return decoder_folder(tmp_path_factory.mktemp("base"))


def check_round_trips(place: Path, stacks: list[str]) -> None:
    """Exports by five structures, and one process that reads all."""
    asked, models = {}, {}
    for n, (stack, kind) in enumerate(itertools.product(stacks, STRUCTURES)):
        models[f"m{n}"] = stack, with_values(adapted(stack, std=0, **STRUCTURES[kind]))
        export(models[f"m{n}"][1], place / f"m{n}")
        last = kind == "injected"
        asked[f"m{n}"] = asked_of(stack) | dict(again=last, compiled=last and stack in ("BERT", "Llama"))
        assert (place / f"m{n}" / "modeling_lor2c.py").exists() is (kind != "all injected")
    for name, found in read_elsewhere(place, asked).items():
        inputs, (stack, model) = asked[name]["batch"], models[name]
        with torch.no_grad():
            want, off = model(**inputs).logits, build(stack)(**inputs).logits
        assert not found["keys"] and not torch.allclose(want, off, atol=1e-3)
        for logits in (found["logits"], *(found[key] for key in ("again", "compiled") if key in found)):
            torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
        prompt = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
        for tokens in found["tokens"]:
            assert torch.equal(tokens, model.generate(**prompt, **GREEDY))


def test_round_trips_in_a_process_without_lor2c(tmp_path):
    check_round_trips(tmp_path, ["BERT", "Llama"])


def test_round_trips_of_every_stack(tmp_path):
    check_round_trips(tmp_path, [stack for stack in STACKS if stack not in ("BERT", "Llama")])


def test_units_are_in_the_pair(tmp_path):
    model = get_peft_model(build("Llama"), lor2c.LoR2CConfig(r=2, alpha=4, units="stream", dropout=0.0))
    model.train()(**batch("Llama"))
    export(with_values(model), tmp_path / "m")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert all((m.lor2c_units["default"] != 1).any() for _, m in residuals(model))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch("Llama")).logits, model(**batch("Llama")).logits)


def test_residuals_stay_float32_in_a_base_of_sixteen_bits(base, tmp_path):
    half = T.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = with_values(get_peft_model(half, lor2c.LoR2CConfig(r=2, alpha=4)))
    export(model, tmp_path / "m")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    types = {name: p.dtype for name, p in again.named_parameters()}
    assert {dtype for name, dtype in types.items() if ".lor2c." in name} == {torch.float32}
    assert {dtype for name, dtype in types.items() if ".lor2c." not in name} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again(**batch("Llama")).logits, model(**batch("Llama")).logits)


# The command


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(T.AutoModelForCausalLM.from_pretrained(base), lor2c.LoR2CConfig(r=2, task_type="CAUSAL_LM"))
    with_values(model).save_pretrained(folder)
    return folder


def test_a_decoder_that_is_exported_answers(base, adapter, tmp_path, capsys):
    (Path(base) / "README.md").write_text("---\nlicense: gemma\n---\n# A base\n")
    main(["export", str(adapter), "--to", str(tmp_path / "new/folder")])
    assert "modeling_lor2c.py" in capsys.readouterr().out
    card = (tmp_path / "new/folder/README.md").read_text()
    assert "license: gemma" in card and "AutoModelForCausalLM" in card and base not in card
    ask = ["--prompt", "Hello", "--max-new-tokens", "8", "--template", "none"]
    main(["generate", str(adapter), *ask])
    want = capsys.readouterr().out
    main(["generate", str(tmp_path / "new/folder"), "--trust-remote-code", *ask])
    assert capsys.readouterr().out == want != ""
    error = refused(capsys, "generate", tmp_path / "new/folder", *ask)
    assert "--trust-remote-code" in error


def test_an_adapter_with_units_comes_back_from_its_folder(base, tmp_path, capsys):
    """Its file holds the units beside the pair that they are folded into: `generate` and `export` read it."""
    config = lor2c.LoR2CConfig(r=2, units="stream", dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(T.AutoModelForCausalLM.from_pretrained(base), config)
    ids = torch.randint(3, 250, (2, 9))
    model.train()(ids)
    with_values(model).save_pretrained(tmp_path / "adapter")
    main(["export", str(tmp_path / "adapter"), "--to", str(tmp_path / "new")])
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "new", trust_remote_code=True)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    main(["generate", str(tmp_path / "adapter"), "--prompt", "Hello", "--max-new-tokens", "4", "--template", "none"])
    assert capsys.readouterr().out


def test_what_cannot_be_exported_is_one_line(base, adapter, tmp_path, capsys):
    def other(name, **settings) -> Path:
        folder = shutil.copytree(base, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    T.LlamaForCausalLM(T.LlamaConfig(**DECODER | {"hidden_size": 24})).save_pretrained(tmp_path / "narrow")
    byte_tokenizer().save_pretrained(tmp_path / "narrow")
    packed = other("packed", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").write_text("mine")
    for arguments, message in [
        ((adapter, "--to", tmp_path / "taken"), "is there already"),
        ((adapter, "--to", tmp_path / "taken/mine"), "is there already"),
        ((adapter, "--to", tmp_path / "new", "--model", tmp_path / "narrow"), "does not fit"),
        ((adapter, "--to", tmp_path / "new", "--model", packed), "quantised"),
        ((adapter, "--to", tmp_path / "new", "--format", "peft-lora"), "no LoRA equals them"),
        ((adapter, "--to", tmp_path / "new", "--format", "gguf"), "transformers, peft-lora"),
        ((base, "--to", tmp_path / "new"), "needs no export"),
        ((tmp_path, "--to", tmp_path / "new"), "needed"),
    ]:
        assert message in refused(capsys, "export", *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["narrow", "packed", "taken"]
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine"]


def test_a_disk_that_takes_no_more_leaves_nothing(adapter, base, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.ModelCard.save", full)
    assert "No space left" in refused(capsys, "export", adapter, "--to", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_plain_lora_for_servers(base, tmp_path, capsys):
    """PEFT's LoRA and all-injected LoR2C, by the command; PEFT reads both without lor2c's help."""
    for n, config in enumerate(
        (
            LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            lor2c.LoR2CConfig(r=2, spans=[], injected={t: [2, 4] for t in range(4)}, task_type="CAUSAL_LM"),
        )
    ):
        model = with_values(get_peft_model(T.AutoModelForCausalLM.from_pretrained(base), config))
        model.save_pretrained(tmp_path / f"adapter{n}")
        main(["export", str(tmp_path / f"adapter{n}"), "--to", str(tmp_path / f"lora{n}"), "--format", "peft-lora"])
        again = PeftModel.from_pretrained(T.AutoModelForCausalLM.from_pretrained(base), tmp_path / f"lora{n}").eval()
        assert type(again.peft_config["default"]) is LoraConfig
        ids = torch.randint(3, 250, (2, 9))
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
