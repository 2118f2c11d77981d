"""Several processes: torchrun on CPU, with merges and injections amid training, next to one process on the joined rows."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workers.training import model

from lor2c.cli.main import main
from lor2c.data.base import demo_model
from lor2c.data.demo import load_demo
from lor2c.runs.train import last_complete_checkpoint
from lor2c.training import surgery
from lor2c.training.distributed import rebuild
from lor2c.training.imlor2c import IMCallback

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WORKER = Path(__file__).parents[1] / "workers" / "training.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def start(module: str, *arguments: str | Path) -> psutil.Popen:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)


def kill(process: psutil.Popen) -> None:
    """SIGKILL to a process and all that it has started: torchrun gives each of them a session of its own."""
    family = [process, *process.children(recursive=True)] if process.is_running() else []
    for one in family:
        one.kill()
    process.communicate()


def finish(process: psutil.Popen, timeout: float = 240) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        kill(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def succeeded(process: psutil.Popen) -> subprocess.CompletedProcess:
    done = finish(process)
    assert done.returncode == 0, done.stderr[-8000:]
    return done


# Training under DistributedDataParallel and FSDP 2

QUICK = ["trainer", "shared", "in units", "fitted", "accelerate", "sharded", "sharded, in units"]
SLOW = ["accumulated", "sharded, fitted", "sharded, checkpointed", "sharded, accumulated"]
ALONE = ["retrained", "forgotten", "refused", "wrapped"]  # nothing to compare with in one process


def carried_out(folder: Path, compared: list[str], others: list[str]) -> Path:
    """Both processes' results, `RUN.0.pt` and `RUN.1.pt`, and those of one process under `one`."""
    (folder / "one").mkdir()
    two = start(*TORCHRUN, WORKER, folder, *compared, *others)
    one = psutil.Popen(
        [sys.executable, WORKER, folder / "one", *compared], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        succeeded(one), succeeded(two)
    finally:
        kill(one), kill(two)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return carried_out(tmp_path_factory.mktemp("runs"), QUICK, ALONE)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory) -> Path:
    return carried_out(tmp_path_factory.mktemp("slow_runs"), SLOW, ["wrapped otherwise"])


def read(folder: Path, name: str, rank: int = 0) -> dict:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=False)


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between the tensors of two dictionaries."""
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def equal(a: dict, b: dict) -> bool:
    states = len(a["moments"]) == len(b["moments"]) and all(
        far(x, y) == 0 for x, y in zip(a["moments"], b["moments"], strict=True)
    )
    return states and a["moves"] == b["moves"] and far(a["parameters"], b["parameters"]) == 0


@pytest.fixture
def folder(request) -> Path:
    return request.getfixturevalue("slow_runs" if request.node.get_closest_marker("slow") else "runs")


TRAININGS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", TRAININGS)
def test_processes_stay_equal(folder, name):
    """The same moves at the same steps; parameters and optimizer states to the last bit, whatever each process draws."""
    a, b = read(folder, name, 0), read(folder, name, 1)
    assert a["world"] == b["world"] == 2 and equal(a, b)
    assert [move[:3] for move in a["moves"]] == [(4, "inject", "done"), (8, "merge", "done"), (8, "inject", "done")]
    assert a["optimizer holds the trained"] and b["optimizer holds the trained"] and all(a["moments"])


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_are_one_with_the_joined_rows(folder, name):
    a, alone = read(folder, name), read(folder / "one", name)
    near = 1e-2 if "fitted" in name else 1e-5  # a fit picks directions, and those of equal weight by their last digits
    assert alone["world"] == 1 and a["moves"] == alone["moves"] and len(a["losses"]) == 24
    assert far(a["parameters"], alone["parameters"]) < near
    assert max(far(x, y) for x, y in zip(a["moments"], alone["moments"], strict=True)) < near
    assert a["losses"] == pytest.approx(alone["losses"], abs=near)


@pytest.mark.parametrize("name", TRAININGS)
def test_what_a_change_leaves_is_trained(folder, name):
    """Every parameter of the new structure moves within ten steps, in both processes."""
    for rank in (0, 1):
        found = read(folder, name, rank)
        assert found["changed"].keys() == found["parameters"].keys() and all(found["changed"].values())
        assert any("lora_A" in key for key in found["changed"])


def test_a_rebuild_sends_what_is_trained_and_not_ignored(monkeypatch):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        module[1].requires_grad_(False)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["0.weight"])
        wrapper, sent = DistributedDataParallel(module), []
        monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, **_: sent.append(tensor.data_ptr()))
        rebuild(wrapper)
        assert sent == [p.data_ptr() for p in (module[0].bias, module[2].weight, module[2].bias)]
    finally:
        torch.distributed.destroy_process_group()


def test_without_the_rebuild_processes_part(runs):
    """The tests above would see a reducer that does not know of new parameters."""
    a, b, alone = read(runs, "forgotten", 0), read(runs, "forgotten", 1), read(runs / "one", "trainer")
    assert a["moves"] == b["moves"] == alone["moves"] and a["wrapper"] == "DistributedDataParallel"
    assert far(a["parameters"], b["parameters"]) > 1e-2 and not equal(a, b)
    assert far(a["parameters"], alone["parameters"]) > 1e-2


def test_a_second_trainer_while_the_first_is_alive(runs):
    """Two wrappers around one model: the one in use learns of the change."""
    a, b = read(runs, "retrained", 0), read(runs, "retrained", 1)
    assert a["wrappers"] == 2 and [move[:3] for move in a["moves"]] == [(8, "inject", "done")] and equal(a, b)


def test_options_of_the_wrapper_outlive_a_change(runs):
    """A device mesh, a static graph, the size of buckets, a communication hook, a forward hook."""
    options = dict.fromkeys(("mesh", "static graph", "buckets", "hooks"), True)
    assert read(runs, "wrapped", 0) == read(runs, "wrapped", 1) == options


@pytest.mark.slow
def test_other_wrappers_outlive_a_change(slow_runs):
    found = read(slow_runs, "wrapped otherwise", 0)
    assert found == read(slow_runs, "wrapped otherwise", 1) == {"FSDP 2 with replicas": True, "compiled": True}


def test_residuals_are_units_of_their_own(runs):
    """FSDP 2 after a merge and two injections: one residual, A and B of q and v in two layers, four layers, the model."""
    found = read(runs, "sharded")
    wanted = {"FSDPLoR2CLayer": 1, "FSDPLinear": 8, "FSDPLlamaDecoderLayer": 4, "FSDPPeftModel": 1}
    assert {kind: found["units"].count(kind) for kind in found["units"]} == wanted
    assert found["all sharded"] and found["state sharded"]


@pytest.mark.parametrize(
    "misuse, sentence",
    [
        ("not apart", "shard_residuals(model, mesh=...) before fully_shard on the layers"),
        ("not apart, callback", "shard_residuals(model, mesh=...) before fully_shard on the layers"),
        ("too late", "shard_residuals(model, mesh=...) before fully_shard on the layers"),
        ("share", "share=True has one A for all residuals, which no fully_shard unit can own"),
        ("two", "one adapter can be sharded, found default, other"),
        ("FSDP 1", "cannot change under FullyShardedDataParallel: FSDP 1 flattens parameters"),
        ("optimizer", "cannot change under ZeroRedundancyOptimizer"),
    ],
)
def test_what_cannot_change_says_so(runs, misuse, sentence):
    for rank in (0, 1):
        found = read(runs, "refused", rank)
        assert sentence in found[misuse] and found["untouched"]


def test_data_parallel_is_refused():
    wrapped = nn.DataParallel(model())
    with pytest.raises(TypeError, match="nn.DataParallel copies the model .* one process per GPU with torchrun"):
        surgery.merge_modules(wrapped, 0, 1)
    assert len(surgery.tuner_of(wrapped.module).layout().spans) == 4


class DeepSpeedEngine(nn.Module):
    """A stand-in with the name of DeepSpeed's class; DeepSpeed itself is not run."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedOptimizerWrapper:
    """A stand-in with the name of accelerate's class."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_deepspeed_is_refused_by_name():
    peft_model = model()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad])
    with pytest.raises(TypeError, match="DeepSpeed fixes the parameters when it starts; use DistributedDataParallel"):
        surgery.inject_lora(DeepSpeedEngine(peft_model), 0, optimizer=optimizer)
    with pytest.raises(TypeError, match="cannot change under DeepSpeedOptimizerWrapper"):
        surgery.inject_lora(peft_model, 0, optimizer=DeepSpeedOptimizerWrapper(optimizer))
    assert len(surgery.tuner_of(peft_model).layout().spans) == 4


def compile_whole(peft_model):
    return torch.compile(peft_model, backend="eager")


def compile_layers(peft_model):
    for layer in peft_model.base_model.model.model.layers:
        layer.compile(backend="eager")
    return peft_model


def compile_forward(peft_model):
    base = peft_model.get_base_model()
    base.forward = torch.compile(base.forward, backend="eager")
    return peft_model


def compile_in_place(peft_model):
    peft_model.compile(backend="eager")
    return peft_model


@pytest.mark.parametrize(
    "compiled",
    [
        compile_layers,
        compile_forward,
        pytest.param(compile_whole, marks=pytest.mark.slow),
        pytest.param(compile_in_place, marks=pytest.mark.slow),
    ],
)
def test_a_change_takes_effect_in_compiled_code(compiled):
    """Hooks that come and go after the first, compiling, forward."""
    torch.compiler.reset()
    plain, fast = model().eval(), compiled(model().eval())
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = []
    for change in (None, surgery.merge_modules, surgery.inject_lora):
        for one in (plain, fast) if change else ():
            torch.manual_seed(0)
            change(one, *((0, 1) if change is surgery.merge_modules else (3,)))
        with torch.no_grad():
            logits.append(plain(input_ids=ids).logits)
            torch.testing.assert_close(fast(input_ids=ids).logits, logits[-1])
    assert not torch.allclose(logits[0], logits[1], atol=1e-4) and not torch.allclose(logits[1], logits[2], atol=1e-4)


# The command line

RUN = (
    "glue --task sst2 --method imlor2c --model minilm --epochs 3 --batch-size 8 --max-length 32 --lr 0.002 --seed 3 "
    "--max-merges 1 --max-injections 1 --max-train-samples 64"
).split() + (
    ["--device", "cpu"] if torch.cuda.is_available() else []
)  # without a GPU, the default finds the others, too


def command(data: Path, folder: Path) -> tuple[str | Path, ...]:
    return (*TORCHRUN, "-m", "lor2c", *RUN, "--data-dir", data, "--output-dir", folder)


def outcome(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "record.json").read_text()), load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(glue_data, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, succeeded(start(*command(glue_data, folder))).stdout


def test_one_record_and_each_line_once(undisturbed):
    folder, out = undisturbed
    record, tensors = outcome(folder)
    names = {p.name for p in folder.iterdir()}
    assert {"adapter", "record.json", "run.json"} <= names and "checkpoints" not in names
    assert record["processes"] == 2 and record["steps"] == 3 * 64 // (2 * 8)
    moves = [entry["move"]["kind"] for entry in record["structure"] if entry["move"]]
    assert moves == ["merge", "inject"] and any("lora_A" in key for key in tensors)
    lines = out.splitlines()
    firsts = [line.split()[0] for line in lines]
    wanted = ["sst2", *["epoch"] * 4, "about", "epoch", "best", "record:", "adapter:"]
    assert firsts[: len(wanted)] == wanted and len(lines) == len(set(lines))


def test_the_adapter_is_what_the_record_says(undisturbed):
    """Loaded here, in one process, it has the loss and accuracy that two processes have found."""
    folder, _ = undisturbed
    best = outcome(folder)[0]["metrics"]["best"]
    rows = load_demo()["validation"].select(range(64))
    base = AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=2)
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    batch = tokenizer(list(rows["text"]), padding=True, truncation=True, max_length=32, return_tensors="pt")
    labels = torch.tensor(rows["label"])
    with torch.no_grad():
        logits = loaded(**batch).logits
    assert (logits.argmax(-1) == labels).float().mean().item() == pytest.approx(best["accuracy"])
    assert F.cross_entropy(logits, labels).item() == pytest.approx(best["loss"], abs=1e-4)


def test_decisions_of_other_processes_are_refused():
    """A merge at the end of an epoch of 4 steps, in two processes; the epochs of one have 8."""
    changer = IMCallback(max_merges=1, max_injections=0)
    changer.history = [{"step": 4, "move": {"kind": "merge"}}]
    with pytest.raises(RuntimeError, match="a decision of step 4, merge, that this training has not"):
        changer.begin(model(), steps=24, steps_per_epoch=8, step=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_and_resumed_is_the_undisturbed_run(undisturbed, glue_data, tmp_path, capsys):
    """SIGKILL to all after a changed structure's checkpoint; refused without --resume; then the same to the last bit."""
    process, checkpoints = start(*command(glue_data, tmp_path / "run")), tmp_path / "run" / "checkpoints"
    try:
        deadline = time.monotonic() + 200
        while True:
            found = last_complete_checkpoint(checkpoints)
            if found and all(zipfile.is_zipfile(found / f"rng_state_{rank}.pth") for rank in (0, 1)):
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        kill(process)
    assert not (tmp_path / "run" / "record.json").exists()

    before = contents(tmp_path / "run")
    again = finish(start(*command(glue_data, tmp_path / "run")))
    assert again.returncode != 0 and "holds an unfinished run: add --resume" in again.stderr
    with pytest.raises(SystemExit, match="2"):  # one process for two
        main([*map(str, command(glue_data, tmp_path / "run")[len(TORCHRUN) + 2 :]), "--resume"])
    assert "processes was 2, now 1" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before

    done = succeeded(start(*command(glue_data, tmp_path / "run"), "--resume"))
    assert done.stdout.count("going on from checkpoint-") == 1 and done.stdout.count("best epoch") == 1
    (record, tensors), (want, wanted) = outcome(tmp_path / "run"), outcome(undisturbed[0])
    same = ("history", "metrics", "structure", "processes", "steps")
    assert {key: record[key] for key in same} == {key: want[key] for key in same}
    assert far(tensors, wanted) == 0


@pytest.mark.slow
def test_accelerate_launch_is_torchrun(undisturbed, glue_data, tmp_path):
    """Its start for several GPUs, on CPUs; its `--cpu` would start one process only."""
    launch = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    program = command(glue_data, tmp_path / "run")[len(TORCHRUN) :]
    succeeded(start("accelerate.commands.launch", *launch.split(), *program))
    (record, tensors), (want, wanted) = outcome(tmp_path / "run"), outcome(undisturbed[0])
    assert record["processes"] == 2 and record["history"] == want["history"] and far(tensors, wanted) == 0
