"""Answers in a text: SQuAD's own rules, windows, refused rows, and runs whose scores are those of the adapter that they leave."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as T
from conftest import refused
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import ENCODER, byte_tokenizer, decoder_folder

from lor2c.data.base import demo_model, load_classifier
from lor2c.data.questions import SQUAD, make_windows, normalise, score_answers, score_windows
from lor2c.runs.progress import Progress
from lor2c.runs.recipes import make_run
from lor2c.runs.train import train

TOWNS = "paris rome oslo lima cairo delhi tokyo quito".split()
FILLER = "the old river runs by a mill and many people like to walk there in spring".split()


def questions(n: int) -> list[dict]:
    """The answer is the only town in the text, anywhere in it."""
    rows = []
    for i in range(n):
        town, place = TOWNS[i % 8], i * 5 % 14
        words = [*FILLER[:place], town, *FILLER[place:]]
        start = len(" ".join(words[:place])) + (place > 0)
        answers = {"text": [town], "answer_start": [start]}
        rows.append({"question": f"which town is number {i} ?", "context": " ".join(words), "answers": answers})
    return rows


def write(folder: Path, rows: dict[str, list[dict]]) -> Path:
    (folder / "squad").mkdir(parents=True, exist_ok=True)
    for split, part in rows.items():
        pq.write_table(pa.Table.from_pylist(part), folder / f"squad/{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("rows"), {"train": questions(160), "validation": questions(48)[::-1]})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A random encoder that reads MiniLM's tokens, and a random decoder that reads bytes."""
    folder, tokenizer = tmp_path_factory.mktemp("encoder"), T.AutoTokenizer.from_pretrained(demo_model())
    torch.manual_seed(0)
    config = T.BertConfig(**{**ENCODER, "vocab_size": len(tokenizer), "hidden_size": 32, "initializer_range": 0.2})
    T.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"encoder": str(folder), "decoder": decoder_folder(tmp_path_factory.mktemp("decoder"))}


# The rules of SQuAD's own script, worked out by hand


@pytest.mark.parametrize(
    "given, right, f1, exact",
    [
        ("The  Denver-Broncos.", ["denverbroncos"], 1, 1),  # a hyphen joins words: punctuation goes, nothing comes
        ("an apple a day", ["apple day", "x"], 1, 1),
        ("theatre", ["the atre"], 0, 0),  # an article is a word, no beginning of one
        ("1,000 men", ["1000 men"], 1, 1),
        ("men men", ["men"], 2 / 3, 0),  # words count as often as they stand there
        ("10 b.c. in Rome", ["Rome", "in Rome"], 2 * 2 / (4 + 2), 0),  # the better of two
        ("", ["Rome"], 0, 0),
        ("The", ["a"], 0, 1),  # nothing is left of either: the same text, and no word that they share
        ("Zürich–Köln", ["zürich–köln"], 1, 1),  # punctuation is ASCII's
    ],
)
def test_scores_are_squads(given, right, f1, exact):
    assert score_answers([given], [right]) == {"f1": pytest.approx(f1), "exact_match": exact}


# Windows


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_each_answer_is_whole_in_a_window_and_no_label_is_wrong(kind):
    tokenizer = T.AutoTokenizer.from_pretrained(demo_model()) if kind == "words" else byte_tokenizer()
    text = " ".join(FILLER * 6)
    starts = [i for i, letter in enumerate(text) if letter == " "][:-3]
    answers = [text[i + 1 : i + 9].strip() for i in starts]
    rows = [
        {"question": "where " * 40, "context": text, "answers": {"text": [a], "answer_start": [text.index(a, i)]}}
        for a, i in zip(answers, starts, strict=True)
    ]
    windows = make_windows(Dataset.from_list(rows), tokenizer, 64)
    labelled = [window for window in windows if window["start_positions"]]
    assert {window["row"] for window in labelled} == set(range(len(rows)))
    for window in labelled:
        first, last = (window["offsets"][window[name]] for name in ("start_positions", "end_positions"))
        assert normalise(answers[window["row"]])[0] in text[first[0] : last[1]]
        assert kind == "words" or text[first[0] : last[1]] == answers[window["row"]]
    assert max(len(ids) for ids in windows["input_ids"]) == 64 and len(windows) > len(rows)
    covered = {c for w in windows if w["row"] == 0 for a, b in w["offsets"] for c in range(a, b)}
    assert covered >= {c for c in range(len(text)) if text[c] != " "}  # nothing of the text is lost


# Rows


@pytest.mark.parametrize(
    "change, said",
    [
        ({"answers": {"text": ["rome"], "answer_start": [1]}}, "row 1: the answer 'rome' is not at 1"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "row 1: the answer '' is not at 0"),
        ({"question": " "}, "row 1: context and question must be texts"),
        ({"context": None}, "row 1: no value in column context"),
        ({"answers": {"text": [], "answer_start": []}}, "row 1: 0 answers at 0 places"),
    ],
)
def test_a_bad_row_is_named(capsys, tmp_path, change, said):
    good = questions(2)
    write(tmp_path, {"train": good, "validation": [good[0], {**good[1], **change}]})
    out = ("--model", "minilm", "--data-dir", tmp_path, "--output-dir", tmp_path / "run")
    assert f"squad/validation {said}" in refused(capsys, "squad", *out)
    assert not (tmp_path / "run").exists()


def test_other_files_and_other_models_are_named(capsys, tmp_path, models):
    out = ("--data-dir", tmp_path, "--output-dir", tmp_path / "run", "--model")
    assert "no data for squad: there is no folder" in refused(capsys, "squad", *out, "minilm")
    write(tmp_path, {"train": questions(2), "validation": [{"question": "a", "text": "b"}]})
    assert "has no column context, answers: it has question, text" in refused(capsys, "squad", *out, "minilm")
    write(tmp_path, {"validation": questions(2)})
    assert "max_length 16 not in this tokenizer's 32..70" in refused(
        capsys, "squad", *out, models["encoder"], "--max-length", 16
    )
    T.Gemma3ForCausalLM(
        T.Gemma3TextConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=16)
    ).save_pretrained(tmp_path / "gemma")
    assert "transformers has no span head for its kind" in refused(capsys, "squad", *out, tmp_path / "gemma")


# Runs


def run_of(method: str, model: str, data: Path, **changes):
    settings = dict(epochs=4, batch_size=16, max_length=64, lr=2e-2, device="cpu", data_dir=str(data), dropout=0.0)
    return make_run("squad", method, model, **{**settings, **changes})


def scored_again(model: str, adapter: Path, data: Path, max_length: int) -> dict[str, float]:
    """What an adapter on disk answers, in one batch and in the order of the file."""
    base, tokenizer, _ = load_classifier(model, ("start", "end"), False, T.AutoModelForQuestionAnswering)
    tuned, tokenizer.padding_side = PeftModel.from_pretrained(base, adapter).eval(), "right"
    rows = SQUAD.rows(run_of("lora", model, data))["validation"]
    windows = make_windows(rows, tokenizer, max_length)
    batch = {name: windows[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = tuned(**tokenizer.pad(batch, return_tensors="pt"))
    return score_windows(windows, out.start_logits.numpy(), out.end_logits.numpy())


@pytest.mark.parametrize("method", ["lora", "lor2c", "reslora-bs", "rmlora"])
def test_an_encoder_learns_and_its_record_is_true(method, models, data, tmp_path):
    """The scores of the record are those of the adapter: rows and scores meet, whatever the order of the batches was."""
    record = train(run_of(method, models["encoder"], data), tmp_path / "run")
    best, baseline = record["metrics"]["best"], record["metrics"]["baseline"]
    assert record["metrics"]["chosen_by"] == "f1" and best["f1"] > baseline["f1"] + 0.2
    again = scored_again(models["encoder"], tmp_path / "run/adapter", data, 64)
    assert again == {name: pytest.approx(best[name], abs=0.03) for name in again}


def test_a_decoder_with_windows_is_interrupted_and_resumed(monkeypatch, models, data, tmp_path):
    run = run_of("lor2c", models["decoder"], data, max_length=96, epochs=2, max_train_samples=64)
    whole = train(run, tmp_path / "whole")
    assert whole["rows"]["train"] > 64 and np.isfinite(whole["metrics"]["best"]["loss"])
    again = scored_again(models["decoder"], tmp_path / "whole/adapter", data, 96)
    assert again == {name: pytest.approx(whole["metrics"]["best"][name], abs=0.03) for name in again}

    def stop(self, args, state, control, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            Progress, "on_epoch_begin", lambda self, a, state, c, **_: stop(self, a, state, c) if state.epoch else None
        )
        with pytest.raises(KeyboardInterrupt):
            train(run, tmp_path / "cut")
    assert not (tmp_path / "cut/record.json").exists()
    cut = train(run, tmp_path / "cut", resume=True)
    assert cut["history"] == whole["history"] and cut["metrics"] == whole["metrics"]
    tensors = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])
