"""Problems with one right answer: rows that are refused, answers in batches, accuracy, and ResLoRA folded afterwards."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers as T
from conftest import refused
from peft import PeftModel
from tiny import byte_tokenizer, decoder_folder

from lor2c.data.base import load_decoder
from lor2c.data.instructions import tokenize_instructions
from lor2c.data.problems import PROBLEMS, find_answer, load_problems, respond
from lor2c.data.prompts import as_tokens, make_prompt
from lor2c.runs.recipes import make_run
from lor2c.runs.train import train

GSM8K = [
    {"question": f"{word}?", "answer": f"#### {n}"} for n in (1, 2, 3) for word in (f"a{n}", f"b{n}", f"c{n}", f"d{n}")
]
SVAMP = {"Body": "Ann had 3", "Question": "Two more?", "Equation": "( 3.0 + 2.0 )", "Answer": "5.0"}
MATHQA = {"Problem": "half of 4 ?", "Rationale": "4 / 2", "options": "a ) 1 , b ) 2", "correct": "b"}
META = {"query": "1 + 1?", "response": "The answer is: 2"}
HELLASWAG = {"ctx": "He sits. he", "endings": ["slides.", "sings."], "label": "1"}


def write(folder: Path, name: str, **splits: list[dict]) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("rows"), "gsm8k", train=GSM8K * 8, test=GSM8K)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random decoder that reads bytes, with a template of few marks: prompts are short."""
    folder = decoder_folder(tmp_path_factory.mktemp("decoder"))
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ '=' if m['role'] == 'user' else '</s>' }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def run_of(method: str, model: str, data: Path, **changes):
    settings = dict(
        epochs=12, batch_size=16, micro_batch_size=16, max_length=32, lr=3e-2, rank=8, dropout=0.0, device="cpu"
    )
    return make_run("gsm8k", method, model, **{**settings, "data_dir": str(data), "template": "chat", **changes})


# Rows


def test_the_five_sets(tmp_path):
    write(tmp_path, "gsm8k", train=GSM8K, test=GSM8K[:2])
    for name, row, split in [
        ("svamp", SVAMP, "test"),
        ("mathqa", MATHQA, "test"),
        ("hellaswag", HELLASWAG, "validation"),
    ]:
        write(tmp_path, name, train=[row, row], **{split: [row]})
    write(tmp_path, "metamathqa", train=[META, {"query": "Prove it.", "response": "It is so."}])
    loaded = {name: load_problems(name, tmp_path) for name in PROBLEMS}
    answers = {name: [row["answer"] for row in rows["validation"]] for name, rows in loaded.items()}
    two = ["1", "1"]
    assert answers == {"gsm8k": two, "svamp": ["5"], "mathqa": ["b"], "metamathqa": two, "hellaswag": ["2"]}
    assert [row["answer"] for row in loaded["metamathqa"]["train"]] == ["2", ""]  # a proof is trained on
    assert all(find_answer(row["output"]) == row["answer"] for rows in loaded.values() for row in rows["train"])


@pytest.mark.parametrize(
    "name, row, said",
    [
        ("gsm8k", {**GSM8K[0], "answer": "four"}, "row 1: no answer is in 'four'"),
        ("gsm8k", {**GSM8K[0], "question": " "}, "row 1: there is no question"),
        ("gsm8k", {**GSM8K[0], "answer": None}, "row 1: no value in column answer"),
        ("svamp", {**SVAMP, "Answer": "many"}, "row 1: no answer is in"),
        ("mathqa", {**MATHQA, "correct": "f"}, "row 1: no answer is in"),
        ("hellaswag", {**HELLASWAG, "label": "2"}, "row 1: label 2 is none of its 2 endings"),
        ("hellaswag", {**HELLASWAG, "label": ""}, "row 1: its columns ctx endings label are of another kind"),
    ],
)
def test_a_bad_row_is_named(capsys, tmp_path, model, name, row, said):
    good = {"gsm8k": GSM8K[0], "svamp": SVAMP, "mathqa": MATHQA, "hellaswag": HELLASWAG}[name]
    scored = PROBLEMS[name].source.scored
    write(tmp_path, name, **{"train": [good], scored: [good, row]})
    out = ("--data-dir", tmp_path, "--output-dir", tmp_path / "run")
    assert f"{name}/{scored} {said}" in refused(capsys, "reason", "--task", name, "--model", model, *out)


def test_settings_that_do_not_fit_are_refused(capsys, data, model, tmp_path):
    out = ("--data-dir", data, "--output-dir", tmp_path / "run")
    assert "minilm' is no decoder" in refused(capsys, "reason", "--task", "gsm8k", "--model", "minilm", *out)
    assert "no data for svamp: there is no folder" in refused(
        capsys, "reason", "--task", "svamp", "--model", model, *out
    )
    assert "has no held_out" in refused(
        capsys,
        "compare",
        "--tasks",
        "gsm8k",
        "--methods",
        "lora:held_out=3",
        "--model",
        model,
        "--output-dir",
        tmp_path / "c",
    )


def test_a_prompt_without_room_is_left_out_and_its_number_told():
    rows = [{"n": n, "instruction": "a" * size, "input": "", "output": "b"} for n, size in ((3, 2), (7, 400))]
    tokens, out = tokenize_instructions(rows, byte_tokenizer(), 300, "alpaca")
    assert len(tokens) == 1 and out == [7]


# Answers


def test_a_batch_says_what_each_prompt_alone_does(model):
    decoder, tokenizer = load_decoder(model)
    prompts = [as_tokens(tokenizer, make_prompt(tokenizer, text)) for text in ("a", "a longer question", "what?")]
    together = respond(decoder.eval(), tokenizer, prompts, 12, 3)
    assert together == [respond(decoder, tokenizer, [prompt], 12, 1)[0] for prompt in prompts]
    assert all(together)


def answers_of(tuned, tokenizer, data: Path) -> float:
    rows = load_problems("gsm8k", data)["validation"]
    prompts = [
        as_tokens(tokenizer, make_prompt(tokenizer, row["instruction"], template="chat"), "chat") for row in rows
    ]
    said = respond(tuned.eval(), tokenizer, prompts, 8, 16)
    return sum(find_answer(text) == row["answer"] for text, row in zip(said, rows, strict=True)) / len(rows)


@pytest.mark.parametrize("method", ["lora", "lor2c", "rmlora", "reslora-is", "reslora-ms"])
def test_a_decoder_learns_and_its_record_is_true(method, model, data, tmp_path):
    """Above the commonest answer; and ResLoRA, which reads earlier layers, folds to plain LoRA that answers too."""
    changes = {"reslora-ms": {"pre_num": -1}, "lor2c": {"epochs": 24}}.get(method, {})
    record = train(run_of(method, model, data, **changes), tmp_path / "run")
    best = record["metrics"]["best"]
    assert record["metrics"]["baseline"] == {"accuracy": pytest.approx(1 / 3)} and best["accuracy"] > 0.4
    base, tokenizer = load_decoder(model)
    tuned = PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    assert answers_of(tuned, tokenizer, data) == pytest.approx(best["accuracy"])
    if method == "reslora-is":
        folded = tuned.fold("weight").put_on(load_decoder(model)[0])
        assert 0 <= answers_of(folded, tokenizer, data) <= 1


def test_interrupted_and_resumed(cut_and_resumed, model, data, tmp_path):
    run = run_of("lor2c", model, data, epochs=2, max_train_samples=32)
    cut_and_resumed(run, tmp_path / "whole", train(run, tmp_path / "whole"))
