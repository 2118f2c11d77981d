"""Instruction tuning: prompts and labels, rows of every kind, losses, interruptions, memory, several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T
from datasets import Dataset
from peft import AdaLoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from tiny import byte_tokenizer, decoder_folder

from lor2c.cli.main import main
from lor2c.data.base import demo_model, gemma_model, load_decoder
from lor2c.data.instructions import ALPACA, INSTRUCTIONS, _hold_out, load_instructions
from lor2c.data.prompts import IGNORED, alpaca_prompt, encode, make_prompt
from lor2c.disk.checkpoints import last_complete_checkpoint
from lor2c.plots.runs import best_of, score_of
from lor2c.runs.folder import as_started
from lor2c.runs.job import prepare
from lor2c.runs.methods import METHODS
from lor2c.runs.recipes import make_run
from lor2c.runs.train import carry_out, train

NAMES = "red blue green white black brown grey pink".split()
RUN = "alpaca --rank 4 --epochs 2 --batch-size 16 --micro-batch-size 8 --held-out 16 --lr 0.01 --seed 3 --device cpu".split()


def rows(n: int) -> list[dict[str, str]]:
    """Instructions that differ, half of them with an input."""
    made = []
    for i in range(n):
        word, given = NAMES[i % 8], f"{NAMES[i % 5]} {NAMES[i % 7]}"
        made.append(
            {"instruction": f"Say {word} {i}.", "input": given * (i % 2), "output": f"{word}, {word} and {given}."}
        )
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("instructions")
    Dataset.from_list(rows(80)).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return decoder_folder(tmp_path_factory.mktemp("decoder"))


def run_of(method: str, model: str, data: Path, **changes):
    settings = dict(epochs=2, batch_size=16, micro_batch_size=8, held_out=16, lr=1e-2, seed=3, device="cpu")
    settings |= {} if method in ("full", "ia3") else {"rank": 4}
    limits = dict.fromkeys([n for n in ("max_merges", "max_injections") if method == "imlor2c"], 1)
    return make_run("alpaca", method, model, data_dir=str(data), **(settings | limits | changes))


# Labels

PROMPTS = [
    ("Name two colours.", "", "red and blue"),
    ("Add them.", "2, 3", "5"),
    ("Translate.", "Straße, 北京", "street, Běijīng"),
    ("Write a list.", "", "- one\n- two\n\n### Response:\nthree"),  # looks like a prompt inside
    ("Answer.", "", "  spaces around \n"),
]


@pytest.mark.parametrize("instruction, given, response", PROMPTS)
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_exactly_the_response_and_the_end_carry_loss(kind, instruction, given, response):
    tokenizer = byte_tokenizer() if kind == "bytes" else T.AutoTokenizer.from_pretrained(demo_model())
    if kind == "words":  # BERT's, which puts an end mark after every text
        tokenizer.eos_token = tokenizer.sep_token
    asked = tokenizer, instruction, given
    row = encode(tokenizer, make_prompt(*asked), make_prompt(*asked, response=response), 512)
    carried = [i for i in row["labels"] if i != IGNORED]
    plain = dict(add_special_tokens=False)
    assert carried == [*tokenizer(response.strip(), **plain).input_ids, tokenizer.eos_token_id]
    assert row["input_ids"][-len(carried) :] == carried  # at the end, in one piece
    assert row["labels"][: -len(carried)] == [IGNORED] * (len(row["labels"]) - len(carried))
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
    if kind == "bytes":
        prompt = tokenizer.decode(row["input_ids"][: -len(carried)])
        assert prompt == alpaca_prompt(instruction, given) and prompt.endswith("### Response:\n")
        assert ("### Input:" in prompt) == bool(given)


def test_a_response_that_is_cut_has_no_end_mark():
    tokenizer = byte_tokenizer()
    prompt = alpaca_prompt("Count.")
    n = len(tokenizer(prompt).input_ids)
    for room in (1, 4, 12, 13, 14):
        row = encode(tokenizer, prompt, prompt + "one two three", n + room)
        carried = [i for i in row["labels"] if i != IGNORED]
        assert tokenizer.decode(carried) == ("one two three"[:room] + "</s>" * (room > 13))
        assert len(row["input_ids"]) == n + min(room, 14)
    assert set(encode(tokenizer, prompt, prompt + "one", n)["labels"]) == {IGNORED}  # no room at all


def test_a_chat_template_brings_its_own_marks():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = tokenizer, "Add.", "2, 3", "chat"
    row = encode(tokenizer, make_prompt(*asked), make_prompt(*asked, "five"), 512, "chat")
    assert tokenizer.decode(row["input_ids"]) == "<s><user>Add.\n\n2, 3</s><assistant>five</s>"
    assert tokenizer.decode([i for i in row["labels"] if i != IGNORED]) == "five</s>"
    with pytest.raises(ValueError, match="no chat template"):
        make_prompt(byte_tokenizer(), "Add.", template="chat")


def test_a_token_that_reaches_into_the_response_is_the_response_s():
    """A vocabulary that joins the prompt's last character with the response's first one."""
    from tokenizers import Tokenizer, models

    raw = Tokenizer(models.BPE(vocab={"a": 0, ":": 1, "b": 2, ":b": 3, "</s>": 4, "<pad>": 5}, merges=[(":", "b")]))
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    row = encode(tokenizer, "a:", "a:ba", 16)
    assert row["input_ids"] == [0, 3, 0, 4] and row["labels"] == [IGNORED, 3, 0, 4]


# Rows


def test_parquet_json_and_json_lines_are_the_same_rows(data, tmp_path):
    expected = load_instructions(data).rows
    (tmp_path / "mine.json").write_text(json.dumps(rows(80)), encoding="utf-8")
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows(80))
    (tmp_path / "train.jsonl").write_text("\ufeff" + text + "\n\n", encoding="utf-8")
    assert load_instructions(tmp_path / "mine.json").rows == load_instructions(tmp_path).rows == expected
    assert len(expected) == 80


def test_bad_rows_are_counted_and_named(tmp_path):
    file = tmp_path / "rows.json"
    bad = [{"instruction": "", "output": "a"}, {"instruction": "a", "output": " "}, {"instruction": 3, "output": "a"}]
    file.write_text(json.dumps([*rows(3), *bad, {"output": "a"}, *rows(2)]))
    found = load_instructions(file)
    assert found.left_out == {"empty instruction": [3], "empty output": [4], "text is missing": [5, 6]}
    assert [row["n"] for row in found.rows] == [0, 1, 2, 7, 8]
    assert "2 rows left out, text is missing: 5, 6" in found.report()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "[{", "a.json is damaged"),
        ("a.jsonl", '{"instruction": "a"}\n\n{"instr', "line 3 of the file"),
        ("a.json", '{"data": []}', "must hold a list of rows"),
        ("a.json", '[{"question": "a", "answer": "b"}]', "holds question, answer, and no row"),
        ("a.json", "[]", "holds no rows"),
        ("a.parquet", "PAR", "cannot be read as parquet"),
        ("a.csv", "instruction,output", "unknown kind"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_instructions(tmp_path / name)


def test_two_files_or_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        load_instructions(tmp_path)
    for kind in ("json", "jsonl"):
        (tmp_path / f"train.{kind}").write_text("[]")
    with pytest.raises(FileNotFoundError, match="2 of them"):
        load_instructions(tmp_path)


def test_held_out_rows_are_the_same_for_every_seed_and_never_trained_on(data):
    found = load_instructions(data)
    twice = found.rows + [{**row, "n": 80 + row["n"]} for row in found.rows]
    rest, held = _hold_out(replace(found, rows=twice), 20)
    asked = {(row["instruction"], row["input"]) for row in held}
    assert not asked & {(row["instruction"], row["input"]) for row in rest.rows}
    assert len(rest.rows) + len(rest.left_out["prompt is held out"]) + len(held) == 160
    settings = dict(data_dir=str(data), held_out=16, max_train_samples=32, max_length=512)
    runs = [make_run("alpaca", "lora", "m", seed=seed, **settings) for seed in (1, 2)]
    one, other = (INSTRUCTIONS.load_data(ALPACA, run, byte_tokenizer())[0] for run in runs)
    assert one["validation"][:] == other["validation"][:] and one["train"][:] != other["train"][:]
    for n in (0, 80):
        with pytest.raises(ValueError, match="held_out must be from 1 to 79"):
            _hold_out(found, n)


# Training


LIKE_OTHERS = "dora pissa loha dylora sora adapterdrop loreft rlora gmlora reslora-is reslora-bs mergelor2c injectlor2c".split()


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.slow] * (m in LIKE_OTHERS)) for m in METHODS if m != "head"],
)
def test_every_method_learns_and_comes_back(method, model, data, tmp_path):
    changes = {"lokr": {"lr": 0.1}, "full": {"lr": 3e-3}, "adalora": {"lr": 0.1}, "ia3": {"lr": 0.1}}.get(method, {})
    record = train(run_of(method, model, data, **changes), tmp_path / "run")
    before, best = record["metrics"]["baseline"]["held_out_loss"], record["metrics"]["best"]
    assert best["held_out_loss"] < before
    assert record["history"][0]["epoch"] == 0 and record["history"][0]["held_out_loss"] == before
    assert [entry["epoch"] for entry in record["history"]][-1] == 2.0 and len(record["history"]) == 9
    assert record["rows"] == {"train": 64, "validation": 16, "left_out": {}} and record["tokens_per_second"] > 0
    if method == "full":
        loaded, _ = load_decoder(str(tmp_path / "run/model"))
    else:
        loaded = PeftModel.from_pretrained(load_decoder(model)[0], tmp_path / "run/adapter")
    assert written_out(loaded, model, data) == pytest.approx(best["held_out_loss"], abs=1e-5)


def written_out(model, name: str, data: Path) -> float:
    """The held-out loss, a row at a time without padding, a token at a time."""
    run = make_run("alpaca", "lora", name, data_dir=str(data), held_out=16)
    held, _ = INSTRUCTIONS.load_data(ALPACA, run, T.AutoTokenizer.from_pretrained(name))
    total, tokens = 0.0, 0
    for row in held["validation"]:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_p = model.eval()(input_ids=ids).logits[0].double().log_softmax(-1)
        for i, label in enumerate(row["labels"]):
            if label != IGNORED:
                total, tokens = total - log_p[i - 1, label].item(), tokens + 1
    return total / tokens


def test_untrained_loss_is_the_base_s(model, data, tmp_path):
    record = train(run_of("lora", model, data, epochs=1), tmp_path / "run")
    base = written_out(load_decoder(model)[0], model, data)
    assert record["metrics"]["baseline"]["held_out_loss"] == pytest.approx(base, abs=1e-5)


@pytest.mark.parametrize("method", ["lor2c", "adalora"])
def test_micro_batches_change_nothing(method, model, data, tmp_path):
    """Every token of a step has the same weight, however the rows are cut up; AdaLoRA's regulariser is there once."""
    found = {}
    for micro in (16, 4, 1):
        run = run_of(method, model, data, epochs=1, dropout=0.0, micro_batch_size=micro, lr=1e-3)
        train(run, tmp_path / f"{micro}")
        found[micro] = load_file(tmp_path / f"{micro}/adapter/adapter_model.safetensors")
    for micro in (4, 1):
        for name, tensor in found[16].items():
            torch.testing.assert_close(found[micro][name], tensor, rtol=1e-4, atol=1e-5)
    if method == "adalora":
        assert PeftConfig.from_pretrained(tmp_path / "1/adapter").orth_reg_weight == AdaLoraConfig.orth_reg_weight


def start(*arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "lor2c", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_and_resumed_is_the_undisturbed_run(model, data, tmp_path):
    """SIGKILL in the middle of an epoch, after a merge and an injection; the rest with other micro-batches is refused by none."""
    asked = [
        *RUN,
        "--model",
        model,
        "--data-dir",
        data,
        "--method",
        "imlor2c",
        "--max-merges",
        1,
        "--max-injections",
        1,
    ]
    done = start(*asked, "--output-dir", tmp_path / "whole")
    out, err = done.communicate(timeout=200)
    assert done.returncode == 0 and "before training: held_out_loss" in out and "tokens/s" in out, err
    process = start(*asked, "--output-dir", tmp_path / "cut")
    deadline = time.monotonic() + 200
    while not (found := last_complete_checkpoint(tmp_path / "cut/checkpoints")) or int(found.name[11:]) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut/record.json").exists()
    done = start(*asked, "--output-dir", tmp_path / "cut", "--resume")
    out, err = done.communicate(timeout=200)
    assert done.returncode == 0 and "going on from checkpoint-" in out, err
    whole, cut = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("whole", "cut"))
    assert cut["history"] == whole["history"] and cut["metrics"] == whole["metrics"]
    assert cut["structure"] == whole["structure"] and any(entry["move"] for entry in whole["structure"])
    tensors = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])


def test_two_processes_share_a_batch(model, data, tmp_path):
    """Two processes with half of each batch: as many steps, and nearly the same losses, as one process."""
    asked = [*RUN, "--model", model, "--data-dir", data, "--dropout", 0, "--epochs", 1]
    done = start(*asked, "--output-dir", tmp_path / "one")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lor2c",
    ]
    command = [*torchrun, *asked, "--output-dir", tmp_path / "two"]
    both = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    _, err = done.communicate(timeout=200)
    assert done.returncode == 0, err
    assert both.returncode == 0, both.stderr
    one, two = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["steps"] == two["steps"] == 4
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["held_out_loss"] == pytest.approx(b["held_out_loss"], abs=2e-3)
    assert one["metrics"]["baseline"] == pytest.approx(two["metrics"]["baseline"], abs=1e-6)


OUT_OF_MEMORY = """
import resource, sys
from lor2c.runs.recipes import make_run
from lor2c.runs.job import prepare
from lor2c.runs.train import carry_out
model, data, folder = sys.argv[1:]
settings = dict(rank=4, epochs=1, batch_size=64, micro_batch_size=64, held_out=2, device="cpu", data_dir=data)
job = prepare(make_run("alpaca", "lora", model, **settings), folder)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 40 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    carry_out(job)
except MemoryError as error:
    print(error)
"""


def test_out_of_memory_says_what_to_try(model, data, tmp_path):
    """A real one: less address space than a batch of 64 needs."""
    many = [row | {"output": row["output"] * 40} for row in rows(80)]
    (tmp_path / "long.json").write_text(json.dumps(many))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", OUT_OF_MEMORY, model, str(tmp_path / "long.json"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert "out of memory with 64 rows at a time" in done.stdout and "--micro-batch-size 32" in done.stdout, done.stderr
    run = make_run("alpaca",
        "lora", model, rank=4, epochs=1, batch_size=64, micro_batch_size=32, held_out=2, device="cpu",
        data_dir=str(tmp_path / "long.json"),
    )  # fmt: skip
    assert carry_out(prepare(run, tmp_path / "run", resume=True))["steps"] == 2  # and then it goes on


# Refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--template", "vicuna"], "unknown template 'vicuna'"),
        (["--template", "chat"], "no chat template"),
        (["--held-out", "80"], "held_out must be from 1 to 79"),
        (["--micro-batch-size", "5"], "batch_size 16 is not a multiple of 5 rows"),
        (["--max-length", "20"], "max_length 20 leaves no room for a response"),
        (["--quantize", "2bit"], "unknown quantize '2bit'"),
        (["--quantize", "4bit"], "quantize '4bit' cannot train on a CPU"),
        (["--method", "head"], "method 'head' trains nothing"),
        (["--method", "pissa", "--quantize", "8bit"], "method 'pissa' decomposes the base's weights"),
        (["--precision", "fp16"], "precision fp16 needs a GPU"),
        (["--method", "reslora-is", "--checkpointing"], "reads activations that checkpointing does not keep"),
        (["--lr", "inf"], "lr must be above 0, found inf"),
        (["--method", "lora", "--max-merges", "1"], "method 'lora' has no max_merges"),
        (["--model", "minilm"], "is no decoder"),
        (["--model", "no-such/model"], "is no folder, not in the cache"),
        (["--data-dir", "no-such-folder"], "neither file nor folder"),
    ],
)
def test_wrong_input_is_one_line(capsys, model, data, tmp_path, changes, message):
    with pytest.raises(SystemExit) as end:
        main([*RUN, "--model", model, "--data-dir", str(data), "--output-dir", str(tmp_path / "run"), *changes])
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_library_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        load_decoder("gemma-270m", quantize="4bit")
    with pytest.raises(ImportError, match=r"pip install \"lor2c\[gemma\]\""):
        gemma_model(tmp_path)


# From the terminal


def test_tune_ask_and_score(capsys, model, data, tmp_path):
    """alpaca, then generate from the run's folder, then eval with and without the adapter."""
    main([*RUN, "--model", model, "--data-dir", str(data), "--output-dir", str(tmp_path / "run")])
    assert "best epoch 2: held_out_loss" in capsys.readouterr().out
    ask = ["generate", str(tmp_path / "run"), "--max-new-tokens", "6", "--device", "cpu"]
    main([*ask, "--prompt", "Say red 8."])
    alone = capsys.readouterr().out
    main([*ask, "--prompt", "Say red 8.", "--prompt", "Say it in many more words than that, if you please."])
    both = capsys.readouterr().out
    assert both.startswith("> Say red 8.\n") and alone.strip() and alone.strip() in both
    main([*ask, "--prompt", "Say red 8.", "--template", "none"])
    assert capsys.readouterr().out != alone
    pytest.importorskip("lm_eval")
    columns = [{"Body": f"A has {i} cups.", "Question": "How many?", "Answer": f"{i}.0"} for i in range(12)]
    (tmp_path / "svamp").mkdir()
    for split in ("train", "test"):
        Dataset.from_list(columns).to_parquet(tmp_path / "svamp" / f"{split}.parquet")
    score = [
        "eval",
        str(tmp_path / "run"),
        "--tasks",
        "svamp",
        "--data-dir",
        str(tmp_path),
        "--limit",
        "2",
        "--device",
        "cpu",
    ]
    for extra in ([], ["--base"]):
        main([*score, "--output", str(tmp_path / "scores.json"), *extra])
        assert "| svamp | exact_match | " in capsys.readouterr().out
        found = json.loads((tmp_path / "scores.json").read_text())
        assert found["tasks"]["svamp"]["docs"] == 2 and found["harness"].startswith("lm-evaluation-harness")
        assert found["adapter"] == (None if extra else str(tmp_path / "run"))


def test_compare_takes_instructions_too(capsys, model, data, tmp_path):
    """Lower is better there, and the figure to beat is the base's own."""
    main(
        [
            *"compare --tasks alpaca --methods lora,lor2c,imlor2c --seeds 3 --rank 4 --epochs 1 --batch-size 16".split(),
            *"--held-out 16 --lr 0.01 --max-merges 1 --max-injections 1 --device cpu --model".split(),
            *(model, "--data-dir", str(data), "--output-dir", str(tmp_path / "c")),
        ]
    )
    out = capsys.readouterr().out
    assert "| method | adapter parameters | lr | step | alpaca (held out loss) |" in out and "(nothing learnt)" in out
    rows = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in out.splitlines() if line.startswith("| ")
    }
    assert all(float(rows[method]) < float(rows["(nothing learnt)"]) for method in ("lora", "lor2c", "imlor2c"))
    made = [json.loads(file.read_text()) for file in (tmp_path / "c").rglob("record.json")]
    assert score_of(best_of(made)) == min(score_of(record) for record in made) and len(made) == 3


# What a sceptical user tries


def test_a_run_does_not_go_on_with_other_rows(model, tmp_path):
    """The file has the same name and other rows: what was measured before would not belong to what comes."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(rows(40)))
    run = run_of("lora", model, file)
    job = prepare(run, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({**as_started(run), "rows": job.digest}))
    prepare(run, tmp_path / "run", resume=True)
    file.write_text(json.dumps(rows(41)))
    with pytest.raises(ValueError, match="the rows have changed since"):
        prepare(run, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "made, message",
    [
        ([{"instruction": "a", "output": "b"}], "there is one usable row"),
        ([{"instruction": "a", "output": f"{i}"} for i in range(40)], "no row is left to train on"),
    ],
)
def test_too_few_rows(model, tmp_path, made, message):
    (tmp_path / "mine.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=message):
        prepare(run_of("lora", model, tmp_path / "mine.json"), tmp_path / "run")


def test_half_a_unicode_pair_is_named_and_left_out(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps([{"instruction": "x\ud800", "output": "a"}, *rows(2)]))
    assert load_instructions(tmp_path / "mine.json").left_out == {"half of a Unicode pair": [0]}
    (tmp_path / "other.json").write_bytes('[{"instruction": "a"}]'.encode("utf-16"))
    with pytest.raises(ValueError, match="other.json is damaged, or no UTF-8"):
        load_instructions(tmp_path / "other.json")


def test_divergence_is_one_line(capsys, model, data, tmp_path):
    with pytest.raises(SystemExit) as end:
        main([*RUN, "--lr", "1e30", "--model", model, "--data-dir", str(data), "--output-dir", str(tmp_path / "run")])
    assert end.value.code == 1 and capsys.readouterr().err.endswith("training diverged; a lower --lr may help\n")


def test_a_tokenizer_of_another_model_is_refused(model, data, tmp_path):
    config = T.AutoConfig.from_pretrained(model, vocab_size=100)
    T.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"gives token \d+, and the model knows 100"):
        prepare(run_of("lora", str(tmp_path / "base"), data), tmp_path / "run")


def test_training_survives_a_reader_that_goes_away(model, data, tmp_path):
    """As with `| head -1`."""
    process = start(*RUN, "--model", model, "--data-dir", data, "--output-dir", tmp_path / "run")
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=200)
    assert (tmp_path / "run/record.json").exists() and "Traceback" not in process.stderr.read()
