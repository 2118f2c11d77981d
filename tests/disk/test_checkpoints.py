"""A checkpoint with a flipped bit is not gone on from, whichever file it is in."""

import json
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
from tiny import adapted, batch
from transformers import Trainer, TrainingArguments

from lor2c.disk.checkpoints import defect, last_complete_checkpoint, write_digests
from lor2c.disk.files import write_json
from lor2c.runs.folder import as_started, relocate
from lor2c.runs.job import prepare
from lor2c.runs.recipes import make_run
from lor2c.runs.train import carry_out, make_trainer

READ = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


def flip(file: Path, at: float) -> None:
    """Flip a bit, at a share of the file or at a byte of it."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content)) if at < 1 else at] ^= 0x10
    file.write_bytes(content)


def records(file: Path) -> list[int]:
    """Where the content of each record begins, but for paddings, whose bits mean nothing; the last number of a safetensors."""
    if file.suffix == ".safetensors":
        return [file.stat().st_size - 2]
    content, found = file.read_bytes(), []
    with ZipFile(file) as archive:
        for record in archive.infolist():
            at = record.header_offset
            name, extra = (int.from_bytes(content[at + k : at + k + 2], "little") for k in (26, 28))
            found += [at + 30 + name + extra] * (record.file_size > 0)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two checkpoints of a Trainer that knows nothing of us."""
    folder = tmp_path_factory.mktemp("plain")
    rows = [{k: v[0] for k, v in batch("BERT").items()}] * 4
    args = TrainingArguments(folder, max_steps=2, save_steps=1, save_strategy="steps", report_to=[], use_cpu=True)
    Trainer(adapted("BERT"), args, train_dataset=rows).train()
    return folder


@pytest.mark.parametrize("name", READ)
def test_a_flipped_bit_is_passed_over_with_a_line(plain, tmp_path, name):
    shutil.copytree(plain, tmp_path / "run")
    first, second = tmp_path / "run/checkpoint-1", tmp_path / "run/checkpoint-2"
    assert last_complete_checkpoint(tmp_path / "run") == second
    whole = (second / name).read_bytes()
    for at in records(second / name):
        flip(second / name, at)
        with pytest.warns(UserWarning, match="^checkpoint-2 is passed over: "):
            assert last_complete_checkpoint(tmp_path / "run") == first
        (second / name).write_bytes(whole)
    assert last_complete_checkpoint(tmp_path / "run") == second


@pytest.mark.parametrize(
    "names",
    [
        ["global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        ["optimizer.bin", "pytorch_model_fsdp.bin"],
    ],
)
def test_what_deepspeed_and_fsdp_save_is_read_as_well(plain, tmp_path, names):
    """Their optimizers are in files of other names: whole, one bit flipped, and gone."""
    shutil.copytree(plain, tmp_path / "run")
    newest = tmp_path / "run/checkpoint-2"
    (newest / "global_step2").mkdir()
    for name in names:
        shutil.copy(newest / "optimizer.pt", newest / name)
    if "global_step2" in names[0]:
        (newest / "latest").write_text("global_step2")
    (newest / "optimizer.pt").unlink()
    assert last_complete_checkpoint(tmp_path / "run") == newest
    for name in names:
        flip(newest / name, records(newest / name)[0])
        assert "is damaged in" in defect(newest)
        flip(newest / name, records(newest / name)[0])
    (newest / names[0]).unlink()
    with pytest.warns(UserWarning, match="^checkpoint-2 is passed over: .*No such file"):
        assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-1"


def test_digests_see_every_bit_of_every_file(plain, tmp_path):
    shutil.copytree(plain / "checkpoint-2", tmp_path / "checkpoint-2")
    write_digests(tmp_path / "checkpoint-2")
    for file in sorted((tmp_path / "checkpoint-2").iterdir()):
        whole = file.read_bytes()
        for at in (0.1, 0.5, 0.9):
            flip(file, at)
            assert defect(tmp_path / "checkpoint-2"), f"{file.name} at {at}"
            file.write_bytes(whole)
    assert not defect(tmp_path / "checkpoint-2")


def test_several_processes_do_not_begin_anew(plain, tmp_path, monkeypatch):
    """A Trainer of two processes finds no random numbers of its own in a checkpoint of one, and would start at step 0."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="checkpoint-2 was written by one process, and 2 were started: go on with one"):
        last_complete_checkpoint(plain)


@pytest.fixture(scope="module")
def interrupted(glue_data, tmp_path_factory):
    """A run of LoRA that was stopped after its last epoch, and the step of its best, the first; both checkpoints are there."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    run = make_run(
        "sst2", "lora", "minilm", epochs=3, batch_size=16, max_length=32, lr=3e-2, seed=3, device="cpu",
        data_dir=str(glue_data), max_train_samples=32,
    )  # fmt: skip
    trainer, scores = make_trainer(prepare(run, folder)), iter([0.9, 0.5, 0.6])

    class Interrupted(Exception):
        pass

    def interrupt():
        raise Interrupted

    trainer.compute_metrics = lambda _: {"accuracy": next(scores)}
    trainer._load_best_model = interrupt
    write_json(folder / "run.json", as_started(run))
    with pytest.raises(Interrupted):
        trainer.train()
    return run, folder


def test_a_run_goes_on_from_the_one_before(capsys, interrupted, tmp_path):
    run, folder = interrupted
    shutil.copytree(folder, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/checkpoint-6"
    # LoRA's file has no seal, and a state no sum: the run's own digests tell
    for name in ("adapter_model.safetensors", "trainer_state.json", "optimizer.pt"):
        flip(newest / name, 0.7)
        assert name in defect(newest)
        flip(newest / name, 0.7)
    flip(newest / "adapter_model.safetensors", 0.9)
    with pytest.warns(
        UserWarning, match="checkpoint-6 is passed over: adapter_model.safetensors is not as it was saved"
    ):
        record = carry_out(prepare(run, tmp_path / "run", resume=True))
    assert "going on from checkpoint-2" in capsys.readouterr().out and record["steps"] == 6
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["adapter", "record.json", "run.json"]


def test_a_damaged_best_epoch_is_known_before_training(interrupted, tmp_path):
    run, folder = interrupted
    shutil.copytree(folder, tmp_path / "run")
    flip(tmp_path / "run/checkpoints/checkpoint-2/adapter_model.safetensors", 0.9)
    with pytest.raises(FileNotFoundError, match="checkpoint-2, the best epoch so far, cannot be used: adapter_model"):
        carry_out(prepare(run, tmp_path / "run", resume=True))


def test_a_moved_checkpoint_has_right_digests(interrupted, tmp_path):
    _, folder = interrupted
    shutil.copytree(folder, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/checkpoint-6"
    relocate(newest)
    state = json.loads((newest / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(newest.with_name("checkpoint-2")) and not defect(newest)


def test_left_over_checkpoints_are_removed(interrupted, tmp_path):
    """A run that was killed while it removed its checkpoints is finished, and the next call removes the rest."""
    run, folder = interrupted
    shutil.copytree(folder, tmp_path / "run")
    carry_out(prepare(run, tmp_path / "run", resume=True))
    shutil.copytree(folder / "checkpoints/checkpoint-6", tmp_path / "run/checkpoints/checkpoint-6")
    carry_out(prepare(run, tmp_path / "run", resume=True))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["adapter", "record.json", "run.json"]
