"""What others left on the disk, and a network that does not answer: one line, exit code 2, nothing written, nothing run."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import refused
from test_main import RUN, start
from tiny import adapted, decoder_folder
from transformers import LlamaConfig

from lor2c.data.base import demo_model, load
from lor2c.disk.files import write_json
from lor2c.runs.folder import as_started
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


DATA_ONLY = """
import sys, time
import lor2c.cli.train
began = time.monotonic()
from lor2c.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(time.monotonic() - began)
"""
WHOLE = DATA_ONLY.replace("import lor2c.cli.train\n", "")


def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path):
    """A server that takes connections and says nothing: a line within 15 s, for a model and for data.

    A model is asked for before torch is loaded, so that its time holds for the whole command.
    """
    decoder = tmp_path / "decoder"
    LlamaConfig().save_pretrained(decoder)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}
        for code, task, model, named in (
            (WHOLE, "glue --task rte", "roberta-base", "'roberta-base'"),
            (WHOLE, "alpaca", "meta-llama/Llama-2-7b-hf", "'meta-llama/Llama-2-7b-hf'"),
            (DATA_ONLY, "glue --task rte", "minilm", "GLUE's rte is not in the hub's cache"),
            (DATA_ONLY, "alpaca", decoder, "Alpaca-Cleaned is not in the hub's cache"),
        ):
            command = [*task.split(), "--model", model, "--output-dir", tmp_path / "run"]
            done = subprocess.run([sys.executable, "-c", code, *command], env=env, capture_output=True, text=True)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert named in done.stderr and "did not answer within 5 s" in done.stderr
            assert float(done.stdout) < 15
    assert not (tmp_path / "run").exists()


ODD_ROWS = {
    "texts that are lists": {"sentence": [["a"], ["b"]], "label": [0, 1]},
    "no texts": {"sentence": ["a", None], "label": [0, 1]},
    "labels that are lists": {"sentence": ["a", "b"], "label": [[0], [1]]},
    "labels that are structs": {"sentence": ["a", "b"], "label": [{"x": 0}, {"x": 1}]},
    "labels that are texts": {"sentence": ["a", "b"], "label": ["0", "1"]},
    "no labels": {"sentence": ["a", "b"], "label": [0, None]},
    "another label": {"sentence": ["a", "b"], "label": [0, 2]},
    "half a label": {"sentence": ["a", "b"], "label": [0.0, 0.5]},
    "no rows": {"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())},
}


@pytest.mark.parametrize("columns", ODD_ROWS.values(), ids=ODD_ROWS.keys())
def test_odd_rows_are_refused_with_the_file_s_name(capsys, tmp_path, columns):
    folder = tmp_path / "glue/sst2"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"sentence": ["a", "b"], "label": [0, 1]}), folder / "train.parquet")
    pq.write_table(pa.table(columns), folder / "validation.parquet")
    error = refused(capsys, *RUN, "--data-dir", tmp_path / "glue", "--output-dir", tmp_path / "run")
    assert "validation.parquet has " in error and not (tmp_path / "run").exists()


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "record", ["[]", "{}", '"text"', DEEP, '{"task": "sst2", "metrics": []}', '{"task'], ids=lambda r: r[:12]
)
def test_an_odd_record_is_named(capsys, glue_data, tmp_path, record):
    run = make_run(
        "sst2", "lor2c", "minilm", epochs=3, batch_size=16, max_length=32, lr=0.002, seed=3, device="cpu",
        data_dir=str(glue_data), report_to="none",
    )  # fmt: skip
    write_json(tmp_path / "run/run.json", as_started(run))
    (tmp_path / "run/record.json").write_text(record)
    error = refused(capsys, *RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", "--resume")
    assert "record.json is damaged" in error and "Errno" not in error
    (tmp_path / "run/run.json").write_text(record)
    error = refused(capsys, *RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", "--resume")
    assert "run.json is damaged" in error or "cannot be resumed" in error


def test_deep_json_is_refused(capsys, glue_data, tmp_path):
    (tmp_path / "rows.json").write_text(DEEP)
    (tmp_path / "rows.jsonl").write_text(DEEP)
    base = shutil.copytree(demo_model(), tmp_path / "base")
    (base / "config.json").write_text(DEEP)
    out = ("--output-dir", tmp_path / "run")
    for rows in ("rows.json", "rows.jsonl"):
        assert rows in refused(capsys, "alpaca", "--model", "gemma-270m", "--data-dir", tmp_path / rows, *out)
    assert "base" in refused(capsys, *RUN, "--data-dir", glue_data, *out, "--model", base)
    adapter = tmp_path / "adapter"
    adapted("BERT").save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text(DEEP)
    for command in (("inspect", adapter), ("generate", adapter, "--prompt", "?")):
        assert "adapter_config.json" in refused(capsys, *command)


def test_pickled_weights_run_nothing(capsys, glue_data, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    base = shutil.copytree(demo_model(), tmp_path / "base")
    (base / "model.safetensors").unlink()
    for content in (pickle.dumps(Trap(), 2), b"no pickle"):
        (base / "pytorch_model.bin").write_bytes(content)
        error = refused(capsys, *RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", "--model", base)
        assert f"{base}" in error and not (tmp_path / "was-run").exists()
    torch.save({"weights": Trap()}, base / "pytorch_model.bin")
    refused(capsys, *RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", "--model", base)
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
@pytest.mark.parametrize("size", [300, 3_000, 6_000])
def test_a_disk_that_takes_no_more(tmp_path, size):
    """Whichever file does not fit, tokenizers' included: one line, exit code 1, and --resume goes on once there is room."""
    rows = [{"instruction": f"say {n}", "output": str(n)} for n in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [
        *"alpaca --rank 4 --epochs 1 --batch-size 4 --max-length 300 --held-out 4 --device cpu".split(), "--model",
        decoder_folder(tmp_path / "base"), "--data-dir", tmp_path / "rows.json", "--output-dir", tmp_path / "run",
    ]  # fmt: skip

    def train(*more, **options):
        command_line = [sys.executable, "-m", "lor2c", *map(str, command), *more]
        return subprocess.run(command_line, capture_output=True, text=True, **options)

    def limit():
        import resource  # POSIX's

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    full = train(preexec_fn=limit)
    assert full.returncode == 1 and full.stderr.startswith("lor2c: error: "), full.stderr
    assert full.stderr.count("\n") == 1 and "takes no more" in full.stderr and "--resume" in full.stderr
    done = train("--resume" if (tmp_path / "run/run.json").exists() else "--seed=42")
    assert done.returncode == 0 and (tmp_path / "run/record.json").exists(), done.stderr
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["adapter", "config.yaml", "record.json", "run.json"]


def test_the_others_end_with_a_line_when_a_process_dies(glue_data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [*RUN, "--epochs", "200", "--data-dir", glue_data, "--output-dir", tmp_path / "run"]
    meeting = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (start(*command, env={**meeting, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01")
    deadline = time.monotonic() + 200
    while not any((tmp_path / "run/checkpoints").glob("checkpoint-*")):
        assert first.poll() is second.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    second.kill()
    _, said = first.communicate(timeout=200)
    second.communicate()
    assert first.returncode == 1 and "Traceback" not in said
    assert (
        "lor2c: error: another process of this run has ended, look at what it said: the same command with --resume"
        in said
    )
