"""The command line in processes of its own: killed and resumed, damaged, out of reach."""

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import refused
from datasets import Value
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lor2c.cli.main import main
from lor2c.data.base import demo_model, load_classifier
from lor2c.data.demo import load_demo
from lor2c.data.glue import GLUE
from lor2c.disk.checkpoints import defect, last_complete_checkpoint
from lor2c.disk.files import write_json
from lor2c.runs.build import build_model
from lor2c.runs.job import prepare
from lor2c.runs.recipes import make_run
from lor2c.runs.train import carry_out, make_trainer

RUN = "glue --task sst2 --model minilm --epochs 3 --batch-size 16 --max-length 32 --lr 0.002 --seed 3 --device cpu".split()


def start(*arguments: str | Path, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "lor2c", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finish(*arguments: str | Path, **kwargs) -> subprocess.CompletedProcess:
    process = start(*arguments, **kwargs)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def result(folder: Path) -> tuple[dict, dict]:
    record = json.loads((folder / "record.json").read_text())
    return record, load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def undisturbed(glue_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = finish(*RUN, "--data-dir", glue_data, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "epoch 3 of 3" in done.stdout and "about " in done.stdout and f"record: {folder}" in done.stdout
    return folder


def test_a_run_leaves_a_record_and_an_adapter(undisturbed):
    record, tensors = result(undisturbed)
    assert sorted(p.name for p in undisturbed.iterdir()) == ["adapter", "config.yaml", "record.json", "run.json"]
    assert (record["method"], record["task"], record["seed"]) == ("lor2c", "sst2", 3)
    assert record["adapter_parameters"] == 36_864 and record["trainable_parameters"] == 37_634
    assert [e["epoch"] for e in record["history"]] == [1.0, 2.0, 3.0] and record["metrics"]["last"]["epoch"] == 3.0
    assert record["metrics"]["best"] == max(record["history"], key=lambda e: e["accuracy"])
    assert {"train_loss", "loss", "accuracy"} <= record["history"][0].keys()
    assert record["hyper_parameters"]["lr"] == 0.002 and record["versions"]["torch"] == torch.__version__
    assert sum(t.numel() for k, t in tensors.items() if "lor2c_A" in k or "lor2c_B" in k) == 36_864


def test_half_of_a_finished_run(glue_data, undisturbed, tmp_path, capsys):
    """`lor2c shrink` leaves half of the numbers in a folder of its own, and the run as it was."""
    before = result(undisturbed)[0]
    main(["shrink", str(undisturbed), "--output-dir", str(tmp_path / "half"), "--budget", "0.5", "--rows", "16"])
    record, tensors = result(tmp_path / "half")
    assert f"accuracy {before['metrics']['best']['accuracy']:.4f} -> " in capsys.readouterr().out
    assert sum(t.numel() for k, t in tensors.items() if "lor2c_A" in k or "lor2c_B" in k) == 18_432
    assert sorted(p.name for p in (tmp_path / "half").iterdir()) == ["adapter", "record.json"]
    assert record["adapter_parameters"] == 18_432 and result(undisturbed)[0] == before
    main(["inspect", str(tmp_path / "half")])
    assert "18,432 in residuals" in capsys.readouterr().out


def test_a_run_that_cannot_shrink(glue_data, undisturbed, tmp_path, capsys):
    """One line for too small a budget and for another method, and nothing is left behind."""
    new = tmp_path / "new"
    assert "nothing would be left" in refused(capsys, "shrink", undisturbed, "--output-dir", new, "--budget", "1e-6")
    assert not new.exists()
    lora = tmp_path / "lora"
    main([*RUN, "--method", "lora", "--epochs", "1", "--data-dir", str(glue_data), "--output-dir", str(lora)])
    assert "LoR2C model is needed" in refused(capsys, "shrink", lora, "--output-dir", new, "--budget", "0.5")
    assert not new.exists()


def test_killed_and_resumed_is_the_undisturbed_run(capsys, glue_data, undisturbed, tmp_path):
    """SIGKILL after an epoch's checkpoint; --resume ends with the same bits and the same history. No second one beside it."""
    folder = tmp_path / "run"
    arguments = (*RUN, "--data-dir", glue_data, "--output-dir", folder)
    process = start(*arguments)
    deadline = time.monotonic() + 200
    while not last_complete_checkpoint(folder / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--resume"])
    assert end.value.code == 1 and f"error: another process trains in {folder}: wait" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "record.json").exists() and not (folder / "adapter").exists()

    again = finish(*arguments)  # without --resume: refused, nothing overwritten
    assert again.returncode == 2 and "holds an unfinished run: add --resume" in again.stderr
    other = finish(*arguments, "--resume", "--rank", "4")
    assert other.returncode == 2 and "rank was 8, now 4" in other.stderr

    done = finish(*arguments, "--resume")
    assert done.returncode == 0 and "going on from checkpoint-" in done.stdout, done.stderr
    (record, tensors), (want, wanted) = result(folder), result(undisturbed)
    assert record["history"] == want["history"] and record["metrics"] == want["metrics"]
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[k], wanted[k]) for k in wanted)
    assert finish(*arguments, "--resume").stdout.count("best epoch") == 1  # finished: its record, nothing trained


def test_only_complete_checkpoints_are_taken(tmp_path):
    """A checkpoint cut off at any point of its writing is passed over for the one before."""
    from tiny import adapted, batch
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[0] for k, v in batch("BERT").items()}] * 4
    args = TrainingArguments(
        tmp_path, max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="steps"
    )
    Trainer(adapted("BERT"), args, train_dataset=rows).train()
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert last_complete_checkpoint(tmp_path) == second and not defect(first)
    needed = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for name in needed:
        shutil.copytree(second, tmp_path / "kept")
        (second / name).unlink()
        assert last_complete_checkpoint(tmp_path) == first, f"{name} missing"
        shutil.rmtree(second)
        (tmp_path / "kept").rename(second)
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        whole = (second / name).read_bytes()
        (second / name).write_bytes(whole[: len(whole) // 2])
        assert last_complete_checkpoint(tmp_path) == first, f"{name} cut off"
        (second / name).write_bytes(whole)
    assert last_complete_checkpoint(tmp_path) == second
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def test_checkpoints_of_a_named_adapter_count(tmp_path):
    """PEFT puts an adapter with a name of its own one folder down."""
    from tiny import adapted, batch
    from transformers import Trainer, TrainingArguments

    model = adapted("BERT")
    model.add_adapter("poet", model.peft_config["default"])
    model.set_adapter("poet")
    model.delete_adapter("default")
    rows = [{k: v[0] for k, v in batch("BERT").items()}] * 4
    args = TrainingArguments(tmp_path, max_steps=1, save_steps=1, report_to=[], use_cpu=True, save_strategy="steps")
    Trainer(model, args, train_dataset=rows).train()
    assert (tmp_path / "checkpoint-1" / "poet" / "adapter_model.safetensors").is_file()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_run_of_before_a_setting_was_there_is_read(tmp_path, glue_data, undisturbed):
    """A setting that is not in run.json had its default; a damaged file is named."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    started = json.loads((folder / "run.json").read_text())
    for name in ("rules", "max_merges", "processes"):
        del started[name]
    write_json(folder / "run.json", started)
    run = make_run(
        "sst2", "lor2c", "minilm", **{k: v for k, v in started.items() if k not in ("task", "method", "model")}
    )
    assert prepare(run, folder, resume=True).record["method"] == "lor2c"
    with pytest.raises(ValueError, match="rules|method 'lor2c' has no"):
        dataclasses.replace(run, rules="reference")
    (folder / "run.json").write_text('{"task": "sst')
    with pytest.raises(ValueError, match="run.json is damaged"):
        prepare(run, folder, resume=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--task", "imdb"], "'imdb'"),
        (["--method", "vera"], "unknown method 'vera': choose one of head, full, lora"),
        (["--rank", "0"], "rank must be above 0, found 0"),
        (["--epochs", "-1"], "epochs must be above 0, found -1"),
        (["--dropout", "1.5"], "dropout must be at least 0 and below 1"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--max-length", "2"], "max_length"),
        (["--max-merges", "2"], "method 'lor2c' has no max_merges: choose one of imlor2c, mergelor2c"),
        (
            ["--method", "imlor2c", "--max-injections", "-1"],
            "max_injections must be a whole number of at least 0, found -1",
        ),
        (["--method", "imlor2c", "--rules", "code"], "unknown rules 'code': choose one of paper, reference"),
        (["--method", "imlor2c", "--score", "rank"], "unknown score 'rank': choose one of sfs, mean"),
        (["--method", "imlor2c", "--sfs-k", "8"], "k of SFS must be a whole number from 1 to r - 1 = 7, found 8"),
        (["--method", "lora", "--rules", "reference"], "method 'lora' has no rules: choose one of imlor2c"),
        (["--method", "lora", "--share"], "method 'lora' has no share: choose one of lor2c, sharelor2c"),
        (["--method", "rmlora", "--rm-directions", "9"], "has rank 8: choose 1 to 8"),
        (["--method", "rmlora", "--rm-mask", "some"], "unknown mask 'some'"),
        (["--method", "reslora-bs", "--pre-num", "-2"], "pre_num must be a whole number of at least -1, found -2"),
        (["--method", "lora", "--rm"], "method 'lora' has no rm: choose one of reslora-is"),
        (["--method", "lor2c", "--rm-coefficient", "1e-3"], "rm_coefficient is for method 'lor2c' with rm=True"),
        (["--method", "loha", "--dropout", "0.5"], "method 'loha' has no dropout"),
        (["--model", "no-such/model"], "pass the path of a local model"),
        (["--task", "rte"], "rte"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_input_is_one_line(capsys, glue_data, tmp_path, changes, message):
    error = refused(capsys, *RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", *changes)
    assert message.lower() in error.lower()
    assert not (tmp_path / "run").exists()


def test_no_network_and_no_cache(tmp_path):
    """A model and data that only the hub has: a sentence each, soon, and exit code 2."""
    dead = dict(os.environ, HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    began = time.monotonic()
    model = finish("glue", "--task", "rte", "--model", "roberta-base", "--output-dir", tmp_path / "run", env=dead)
    data = finish("glue", "--task", "rte", "--model", "minilm", "--output-dir", tmp_path / "run", env=dead)
    for done, what in ((model, "roberta-base"), (data, "data-dir|data folder|data_dir")):
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and re.search(what, done.stderr), done.stderr
    assert time.monotonic() - began < 100 and not (tmp_path / "run").exists()


def test_a_model_of_another_kind_of_folder(capsys, glue_data, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused(
        capsys, *RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", "--model", tmp_path / "empty"
    )
    assert "is a folder without a config.json" in error


def test_inspect(capsys, undisturbed, tmp_path):
    main(["inspect", str(undisturbed / "adapter")])
    out = capsys.readouterr().out
    assert demo_model() in out and "36,864 in residuals, 770 in head" in out
    drawn = [line.split()[1] for line in out.splitlines() if line.startswith("  layer")]
    assert drawn == ["5", "4", "3", "2", "1", "0"] and out.count("─ residual, 6,144 parameters") == 6
    cut = tmp_path / "cut"
    shutil.copytree(undisturbed / "adapter", cut)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "damaged" in refused(capsys, "inspect", cut)
    assert "adapter_config.json is missing" in refused(capsys, "inspect", tmp_path)


def test_export(capsys, undisturbed, tmp_path):
    """A classifier keeps its head and the names of its labels."""
    main(["export", str(undisturbed), "--to", str(tmp_path / "new")])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new", trust_remote_code=True).eval()
    tuned = PeftModel.from_pretrained(load_classifier("minilm", ("negative", "positive"))[0], undisturbed / "adapter")
    rows = AutoTokenizer.from_pretrained(tmp_path / "new")(["a fine film", "a bore"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**rows).logits, tuned.eval()(**rows).logits)
    assert model.config.id2label == dict(enumerate(GLUE["sst2"].labels))


def test_usage_errors_exit_with_2(capsys):
    for arguments in ([], ["glue"], ["glue", "--task", "rte", "--rank", "x"], ["--no-such-flag"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    for command in (["--help"], ["demo", "--help"], ["glue", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 0
    assert "--max-train-samples" in capsys.readouterr().out


def test_a_taken_folder_is_left_alone(capsys, glue_data, tmp_path):
    """What a run did not write is never replaced; a file is no folder."""
    command = (*RUN, "--data-dir", glue_data, "--output-dir")
    for name in ("adapter", "model", "checkpoints"):
        (tmp_path / name / name).mkdir(parents=True)
        assert f"holds {name}, but not of a run" in refused(capsys, *command, tmp_path / name)
        assert [p.name for p in (tmp_path / name).rglob("*")] == [name]
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "is a file" in refused(capsys, *command, place)
    assert "cannot report to 'nonsense': choose one of none" in refused(
        capsys, *command, tmp_path / "run", "--report-to", "nonsense"
    )


def test_damaged_base_is_one_line(capsys, glue_data, tmp_path):
    shutil.copytree(demo_model(), tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    command = (*RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", "--model", tmp_path / "base")
    assert "is damaged or does not fit" in refused(capsys, *command)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model())


def kept(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_heads_poolers_and_padding(tmp_path, tokenizer):
    """A head of another size is replaced; what a checkpoint lacks is trained; a decoder is padded; positions limit rows."""
    small = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    three = transformers.BertForSequenceClassification(
        transformers.BertConfig(**small, intermediate_size=32, num_labels=3)
    )
    model, _ = build_model(make_run("rte", "lor2c", kept(tmp_path / "nli", three, tokenizer)))
    assert model.base_model.model.classifier.modules_to_save["default"].out_features == 2

    deberta = transformers.DebertaV2Model(transformers.DebertaV2Config(**small, intermediate_size=32))
    model, _ = build_model(make_run("rte", "lora", kept(tmp_path / "deberta", deberta, tokenizer)))
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert trained == {"classifier", "pooler"}

    config = dict(small, intermediate_size=32, max_position_embeddings=70)
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**config))
    _, found = build_model(make_run("rte", "lor2c", kept(tmp_path / "roberta", roberta, tokenizer)))
    assert found.model_max_length == 68  # two positions of the table belong to the padding

    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "film": 2}, unk_token="<unk>"))
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(vocab_size=3, n_embd=16, n_layer=2, n_head=2))
    model, found = build_model(make_run("rte", "lor2c", kept(tmp_path / "gpt2", gpt2, bare)))
    assert found.pad_token == "</s>" and model.config.pad_token_id == 0


def test_a_moved_run_resumes_with_its_best_epoch(glue_data, tmp_path):
    """Trainer remembers its best checkpoint by path: interrupted after the last epoch, moved, and resumed."""
    run = make_run(
        "sst2", "lor2c", "minilm", epochs=3, batch_size=16, max_length=32, lr=3e-2, seed=3, device="cpu",
        data_dir=str(glue_data), max_train_samples=32,
    )  # fmt: skip
    job = prepare(run, tmp_path / "before")
    scores = iter([{"accuracy": 0.9}, {"accuracy": 0.5}, {"accuracy": 0.6}])

    class Interrupted(Exception):
        pass

    def interrupt(*_, **__):
        raise Interrupted

    trainer = make_trainer(job)
    trainer.compute_metrics = lambda _: next(scores)  # so that the first epoch is the best, whatever was learned
    trainer._load_best_model = interrupt
    write_json(job.folder / "run.json", dataclasses.asdict(run))
    with pytest.raises(Interrupted):
        trainer.train()
    first = load_file(tmp_path / "before" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    shutil.move(tmp_path / "before", tmp_path / "after")
    record = carry_out(prepare(run, tmp_path / "after", resume=True))
    _, tensors = result(tmp_path / "after")
    assert record["metrics"]["best"]["epoch"] == 1.0
    assert all(torch.equal(tensors[k], first[k]) for k in first)


def test_every_method_is_read_back(glue_data, tmp_path, tokenizer):
    """Each method trains, saves, and gives the same logits from disk; MNLI has two validation sets, STS-B a score."""
    demo = load_demo()["train"].select(range(48)).rename_column("text", "sentence1")
    rows = demo.add_column("sentence2", demo["sentence1"])
    for task, splits in (
        ("mnli", ("train", "validation_matched", "validation_mismatched")),
        ("stsb", ("train", "validation")),
    ):
        folder = tmp_path / "glue" / task
        folder.mkdir(parents=True)
        names = {"sentence1": "premise", "sentence2": "hypothesis"} if task == "mnli" else {}
        for split in splits:
            kind = Value("int64" if task == "mnli" else "float64")
            rows.rename_columns(names).cast_column("label", kind).to_parquet(folder / f"{split}.parquet")
    changes = dict(
        epochs=1, batch_size=16, max_length=32, max_train_samples=32, device="cpu", data_dir=str(tmp_path / "glue")
    )
    batch = tokenizer(["a fine film", "a bad one"], padding=True, return_tensors="pt")
    for method, task in (("head", "mnli"), ("full", "stsb"), ("lora", "mnli"), ("lor2c", "stsb")):
        job = prepare(make_run(task, method, "minilm", **changes), tmp_path / method)
        record = carry_out(job)
        first = {"mnli": "matched_accuracy", "stsb": "pearson"}[task]
        assert record["metrics"]["chosen_by"] == first and first in record["metrics"]["best"]
        assert ("mismatched_accuracy" in record["metrics"]["best"]) == (task == "mnli") and record["processes"] == 1
        if method == "full":
            again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / method / "model")
        else:
            base, *_ = load_classifier(job.run.model, GLUE[task].labels)
            again = PeftModel.from_pretrained(base, tmp_path / method / "adapter")
        # Copies, because tensors that safetensors maps into memory may be aligned otherwise, and a kernel then adds otherwise.
        again, trained = copy.deepcopy(again).eval(), copy.deepcopy(job.model).eval()
        assert torch.equal(again(**batch).logits, trained(**batch).logits)


def test_demo_passes_limits_to_the_methods_that_have_them(capsys, tmp_path):
    """One run with two merges; limits that no method has are refused."""
    main(["demo", "--methods", "mergelor2c", "--train-size", "64", "--epochs", "1", "--max-merges", "2", "--score", "mean",
          "--output-dir", str(tmp_path / "demo")])  # fmt: skip
    record = json.loads((tmp_path / "demo" / "mergelor2c" / "record.json").read_text())
    settings = record["hyper_parameters"]
    assert (settings["max_merges"], settings["max_injections"], settings["score"]) == (2, 0, "mean")
    assert "structure of mergelor2c" in capsys.readouterr().out
    assert (tmp_path / "demo" / "structure-mergelor2c.png").stat().st_size > 1000
    error = refused(capsys, "demo", "--max-merges", "2", "--output-dir", tmp_path / "other")
    assert "none of the methods has max_merges: choose one of imlor2c, mergelor2c" in error


def test_compare_prints_its_table(capsys, glue_data, tmp_path):
    """Two contenders, one seed each; the same command again trains nothing and prints the same table."""
    command = (
        "compare --tasks sst2 --methods head,lora:rank=2 --seeds 5 --epochs 1 --batch-size 16 --max-length 16 --lr 0.01"
    )
    command = [*command.split(), "--device", "cpu", "--data-dir", str(glue_data), "--output-dir", str(tmp_path / "two")]
    main(command)
    first = capsys.readouterr().out
    assert "| head | 0 | 0.01 |" in first and f"| lora:rank=2 | {6 * 2 * 2 * 384 * 2:,} |" in first
    assert (tmp_path / "two/compare.png").read_bytes().startswith(b"\x89PNG")
    assert {p.parent.name for p in tmp_path.rglob("record.json")} == {"seed-5"}
    main(command)
    again = capsys.readouterr().out
    assert (
        "2 of 2 runs were finished earlier" in again
        and again[again.index("| method") :] == first[first.index("| method") :]
    )
    main(["head" if word.startswith("head") else word for word in command])  # fewer: the other's record stays
    assert "1 finished runs in" in (fewer := capsys.readouterr().out) and "| lora" not in fewer
    assert len(list(tmp_path.rglob("record.json"))) == 2


def test_divergence_is_one_line(capsys, glue_data, tmp_path):
    command = [*RUN, "--data-dir", str(glue_data), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        main([*command, "--max-train-samples", "64", "--method", "lora", "--lr", "1e30"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.endswith("training diverged; a lower --lr may help\n"), said
