"""What others left on the disk, and a network that does not answer: one line, exit code 2, nothing written, nothing run."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused
from test_main import RUN

from lor2c.data.base import demo_model, load
from lor2c.runs.job import prepare
from lor2c.runs.recipes import make_run

CODE = """
from pathlib import Path
from transformers import BertConfig
Path(__file__).with_name("was-run").touch()
Path({mark!r}).touch()
class Config(BertConfig):
    pass
"""


@pytest.fixture
def base_with_code(tmp_path, monkeypatch) -> Path:
    """A base model whose folder brings Python code; whoever is asked says yes."""
    base = tmp_path / "base"
    shutil.copytree(demo_model(), base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(CODE.format(mark=str(tmp_path / "was-run")))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return base


def test_code_of_a_base_model_is_not_run(capsys, glue_data, tmp_path, base_with_code):
    """transformers would ask, and take a `y` on standard input for an answer."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base_with_code)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(Path(demo_model()) / "model.safetensors", adapter / "adapter_model.safetensors")
    out = ("--data-dir", glue_data, "--output-dir", tmp_path / "run")
    for command in (
        (*RUN, *out, "--model", base_with_code),
        ("sweep", "--task", "sst2", "--model", base_with_code, *out),
        ("compare", "--tasks", "sst2", "--methods", "lora", "--model", base_with_code, *out),
        ("generate", adapter, "--prompt", "?"),
        ("eval", adapter, "--tasks", "mmlu"),
        ("generate", base_with_code, "--prompt", "?"),
    ):
        assert "brings code of its own, which is not run unless you trust it" in refused(capsys, *command)
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "run").exists()


def test_code_that_you_trust_is_run(glue_data, tmp_path, base_with_code):
    from transformers import AutoConfig

    load(AutoConfig, str(base_with_code), trust_remote_code=True)
    assert (tmp_path / "was-run").exists()
    run = make_run("sst2", "lor2c", demo_model(), trust_remote_code=True, data_dir=str(glue_data), max_length=32)
    assert prepare(run, tmp_path / "run").run.trust_remote_code


WAIT = """
import sys, time
import lor2c.cli.train
began = time.monotonic()
try:
    main(sys.argv[1:])
finally:
    print(time.monotonic() - began)
"""


def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path):
    """A server that takes connections and says nothing: a line within 15 s, for a model and for data."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}
        for task, model, named in (
            ("glue --task rte", "roberta-base", "'roberta-base'"),
            ("glue --task rte", "meta-llama/Llama-2-7b-hf", "'meta-llama/Llama-2-7b-hf'"),
            ("glue --task rte", "minilm", "GLUE's rte is not in the hub's cache"),
            ("alpaca", "meta-llama/Llama-2-7b-hf", "Alpaca-Cleaned is not in the hub's cache"),
        ):
            command = [*task.split(), "--model", model, "--output-dir", tmp_path / "run"]
            done = subprocess.run([sys.executable, "-c", WAIT, *command], env=env, capture_output=True, text=True)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert named in done.stderr and "did not answer within 5 s" in done.stderr
            assert float(done.stdout) < 15
    assert not (tmp_path / "run").exists()
