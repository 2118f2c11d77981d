"""Tuned models as graphs: ONNX Runtime and OpenVINO compute what the model does, for every size of batch and text."""

from pathlib import Path

import pytest
import torch
import transformers as T
from conftest import refused
from peft import PeftModel, get_peft_model
from tiny import STACKS, adapted, batch, build, decoder_folder, with_values

import lor2c
from lor2c.cli.main import main
from lor2c.inference import graphs
from lor2c.inference.export import export

ENGINES = ("onnx", "openvino")
QUICK = ("BERT",)  # a decoder is in `test_the_command`
SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in STACKS if s not in QUICK and not s.startswith("T5")]


def sizes_of(stack):
    """A padded batch of two rows, three longer rows, and one of a single token."""
    inputs = {key: value for key, value in batch(stack).items() if key != "labels"}
    yield inputs
    wide = {key: torch.cat([value, value])[:3] for key, value in inputs.items()}
    yield {key: torch.cat([value, value[:, :5]], 1) if value.dim() == 2 else value for key, value in wide.items()}
    yield {key: value[-1:, :1] if value.dim() == 2 else value[-1:] for key, value in inputs.items()}


def engine_of(engine, folder):
    """A function from named inputs to logits."""
    if engine == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return lambda inputs: torch.tensor(session.run(["logits"], {k: v.numpy() for k, v in inputs.items()})[0])
    openvino = pytest.importorskip("openvino")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.compile_model(folder / "openvino_model.xml", "CPU", exact)
    return lambda inputs: torch.tensor(compiled({k: v.numpy() for k, v in inputs.items()})["logits"])


def needs(engine):
    for package in ("onnxscript", "onnxruntime") if engine == "onnx" else ("openvino",):
        pytest.importorskip(package)


def check(model, engine, folder, sizes):
    ask = engine_of(engine, folder)
    for inputs in sizes:
        with torch.no_grad():
            want = model(**inputs).logits
            with model.disable_adapter():
                assert (model(**inputs).logits - want).abs().max() > 1e-3
        torch.testing.assert_close(ask(inputs), want.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stack", [*QUICK, *SLOW])
def test_every_engine_computes_the_same(stack, engine, tmp_path):
    """A merged span, injected LoRA, a residual of one layer, and a trained head."""
    needs(engine)
    model = with_values(adapted(stack, std=0, spans=[[0, 1], [3, 3]], injected={2: [2, 4]}))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    export(model, tmp_path / "new", format=engine)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()) and not model.training
    assert getattr(model.get_base_model().config, "use_cache", None) == getattr(build(stack).config, "use_cache", None)
    check(model, engine, tmp_path / "new", sizes_of(stack))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> tuple[str, Path]:
    """A base in sixteen bits with a tokenizer, and an adapter of residuals and LoRA on disk."""
    base, folder = decoder_folder(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("adapter")
    T.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    config = lor2c.LoR2CConfig(r=2, alpha=4, spans=[[0, 2]], lora=[2, 4], task_type="CAUSAL_LM")
    with_values(get_peft_model(T.AutoModelForCausalLM.from_pretrained(base), config)).save_pretrained(folder)
    return base, folder


@pytest.mark.parametrize("engine", ENGINES)
def test_the_command(engine, decoder, tmp_path, capsys):
    """In float32, whatever the base is, with the tokenizer beside it."""
    needs(engine)
    base, adapter = decoder
    main(["export", str(adapter), "--to", str(tmp_path / "new"), "--format", engine])
    files = {path.name for path in (tmp_path / "new").iterdir()}
    graph = {"onnx": {"model.onnx"}, "openvino": {"openvino_model.xml", "openvino_model.bin"}}
    assert {"README.md", "config.json", "tokenizer.json"} | graph[engine] <= files
    assert f"import {engine}" in (tmp_path / "new/README.md").read_text()
    model = PeftModel.from_pretrained(T.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    check(model, engine, tmp_path / "new", sizes_of("Llama"))


def test_what_is_no_graph_leaves_nothing(decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(graphs._NEEDS, "onnx", ())
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot be one graph"):
        export(with_values(adapted("T5 decoder")), tmp_path / "new", format="onnx")
    monkeypatch.setitem(graphs._NEEDS, "openvino", ("no_such_package",))
    line = refused(capsys, "export", decoder[1], "--to", tmp_path / "new", "--format", "openvino")
    assert "needs no_such_package: pip install 'lor2c[openvino]'" in line
    assert not list(tmp_path.iterdir())
