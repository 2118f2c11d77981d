"""Benchmarks by the lm-evaluation-harness: its own scores on local rows, checks before anything runs, and code under limits."""

import json
import os
import random
import socket
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lor2c.tuners.config import LoR2CConfig

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks.drop import utils as drop_utils  # noqa: E402
from lm_eval.tasks.hellaswag import utils as hellaswag_utils  # noqa: E402

from lor2c.inference import benchmarks, humaneval  # noqa: E402
from lor2c.inference import evaluate as ours  # noqa: E402
from lor2c.inference.benchmarks import BENCHMARKS  # noqa: E402
from lor2c.inference.evaluate import evaluate, markdown  # noqa: E402
from lor2c.inference.humaneval import check_code, completed_answer, run_program  # noqa: E402
from lor2c.inference.tasks import check_tasks, load_tasks, read_rows, task_settings  # noqa: E402

REAL = ROOT.parent / "shared/data/eval"
QUICK = ["mmlu_anatomy", "bbh_cot_fewshot_boolean_expressions", "drop", "humaneval", "gsm8k", "svamp", "hellaswag"]


# What the tests share: a reader of bytes, made-up rows in all seven forms, and one who knows all answers


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: any text, without a vocabulary from elsewhere."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE({**alphabet, "</s>": 256}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


def llama(positions: int = 16384) -> LlamaForCausalLM:
    """A random Llama of two layers for bytes: always the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions, bos_token_id=None, eos_token_id=256, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted() -> PeftModel:
    """The same with residuals that are not zero."""
    model = get_peft_model(llama(), LoR2CConfig(task_type="CAUSAL_LM", r=4)).eval()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lor2c_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def write(folder: Path, place: str, rows: list[dict]) -> None:
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(Dataset.from_list(rows).data.table, folder / f"{place}.parquet")


def hellaswag_rows() -> list[dict]:
    """Rows as the hub has them: half a sentence to go on with, or a numbered guide with marks."""
    begun = {"activity_label": "Roofs", "ctx_a": "A man sits on a roof. It rains.", "ctx_b": "the tall Man"}
    guide = {"activity_label": "Home", "ctx_a": "[header] How to tie [title] Take a rope. [step] Bend it.", "ctx_b": ""}
    endings = ["sings.", "Pull  hard. [title] Stop.", "falls down the stairs.", "x"]
    return [{**(begun, guide)[i % 2], "endings": endings, "label": str(i % 4)} for i in range(6)]


def hellaswag_cleaned(row: dict) -> dict:
    """The same row as the local file has it."""
    ctx = hellaswag_utils.preprocess(f"{row['ctx_a']} {row['ctx_b']}")
    return {
        "activity_label": row["activity_label"],
        "ctx": ctx,
        "endings": [hellaswag_utils.preprocess(ending) for ending in row["endings"]],
        "label": row["label"],
    }


def drop_published(row: dict) -> dict:
    """A row of DROP as the hub has it, of one with answers that are numbers."""
    blank = {"day": "", "month": "", "year": ""}
    first, *others = [answer[0] for answer in row["answers"]]
    return {
        "query_id": row["question"],
        "passage": row["passage"],
        "question": row["question"],
        "answer": {"number": first, "date": blank, "spans": [], "worker_id": "w", "hit_id": "h"},
        "validated_answers": {"number": others, "date": [blank] * len(others), "spans": [[]] * len(others)},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with made-up rows of all benchmarks, every subtask included."""
    folder = tmp_path_factory.mktemp("eval")
    draw = random.Random(0)
    for split, rows in (("dev", 5), ("test", 3)):
        questions = [
            {"question": f" What is {s} {i}? ", "choices": list("abcd"), "answer": draw.randrange(4), "subject": s}
            for s in benchmarks.subtasks_of("mmlu").values()
            for i in range(rows)
        ]
        write(folder, f"mmlu/{split}", questions)
    tasks = benchmarks.subtasks_of("bbh").values()
    write(folder, "bbh/test", [{"input": f"{t} {i} is", "target": f"T{i}", "task": t} for t in tasks for i in range(3)])
    drops = [
        {"passage": f"In {i // 2} they won.", "question": f"When {i}?", "answers": [str(i), str(i + 1)]}
        for i in range(40)
    ]
    write(folder, "drop/validation", drops)
    for split, rows in (("train", 8), ("test", 4)):
        write(
            folder, f"gsm8k/{split}", [{"question": f"{i} + 1?", "answer": f"Add.\n#### {i + 1}"} for i in range(rows)]
        )
        sums = [
            {"Body": f"Ann has {i} pens. ", "Question": "How many?", "Answer": f"{1000 * i}.0", "ID": str(i)}
            for i in range(rows)
        ]
        write(folder, f"svamp/{split}", sums)
    write(folder, "hellaswag/validation", [hellaswag_cleaned(row) for row in hellaswag_rows()])
    codes = [
        {
            "task_id": f"T/{i}", "prompt": f'def f(x):\n    """Add {i}."""\n', "entry_point": "f",
            "canonical_solution": f"    return x + {i}\n", "test": f"def check(f):\n    assert f(1) == {1 + i}\n",
        }
        for i in range(3)
    ]  # fmt: skip
    write(folder, "humaneval/test", codes)
    return folder


ANSWER = {
    "bbh": lambda doc: f"Well. So the answer is {doc['target']}.",
    "drop": lambda doc: doc["answers"][0][0],
    "gsm8k": lambda doc: doc["answer"],
    "svamp": lambda doc: f" {float(doc['Answer']):,.0f}",
    "humaneval": lambda doc: doc["canonical_solution"],
}


class Knowing(LM):
    """Answers everything rightly, or everything wrongly."""

    def __init__(self, right: bool = True) -> None:
        super().__init__()
        self.right = right

    def loglikelihood(self, requests):
        def gold(doc):
            return int(doc["answer"]) if "answer" in doc else int(doc["label"])

        return [(0.0 if (one.idx == gold(one.doc)) == self.right else -9.0, False) for one in requests]

    def generate_until(self, requests):
        made = [ANSWER[benchmarks.benchmark_of(one.task_name)](one.doc) for one in requests]
        return made if self.right else [" no" for _ in made]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def values(lm: LM, names: list[str], folder: Path, limit: int | None, template: str = "plain") -> dict[str, dict]:
    """Every task's metrics, of a language model of the harness."""
    loaded = load_tasks(check_tasks(names, folder, limit, True, template), folder, template)
    with ours._quiet():
        found = ours._scores(lm, loaded, limit, run_code=True, template=template)
    return {name: ours._metrics(found["results"][name]) for name in names}


# The harness's own


FUNCTIONS = {
    "drop": {"process_docs": drop_utils.process_docs, "process_results": drop_utils.process_results},
    "hellaswag": {"process_docs": hellaswag_utils.process_docs},
}


def settings_of(name: str) -> dict:
    """The harness's configuration of a task, whose index has names for functions."""
    settings = benchmarks.harness_index()[name].cfg | FUNCTIONS.get(name, {})
    return {key: value for key, value in settings.items() if key != "tag"} | {"task": name}


def harness_tasks(folder: Path) -> list[ConfigurableTask]:
    """Tasks of the harness's configurations, with the same rows in the schema of the hub, made without our module's tasks."""

    def task(name: str, rows: dict[str, Dataset], shots: int, **changes) -> ConfigurableTask:
        changes |= {"custom_dataset": lambda **_: rows, "num_fewshot": shots}
        return ConfigurableTask(config={**settings_of(name), **changes})

    def table(place: str, column: str | None = None, value: str | None = None) -> Dataset:
        rows = pq.read_table(folder / f"{place}.parquet").to_pylist()
        return Dataset.from_list([row for row in rows if column is None or row[column] == value])

    drop = {split: [drop_published(row) for row in rows] for split, rows in read_rows("drop", folder).items()}
    mmlu = {split: table(f"mmlu/{split}", "subject", "anatomy") for split in ("dev", "test")}
    bbh = {"test": table("bbh/test", "task", "boolean_expressions")}
    published = {"validation": Dataset.from_list(hellaswag_rows()), "train": Dataset.from_list(hellaswag_rows())}
    return [
        task("mmlu_anatomy", mmlu, 5),
        task("bbh_cot_fewshot_boolean_expressions", bbh, 3),
        task(
            "drop", {split: Dataset.from_list(rows) for split, rows in drop.items()}, 3,
            doc_to_target="{{answers[0]|join(',')}}",
        ),
        task("gsm8k", {split: table(f"gsm8k/{split}") for split in ("train", "test")}, 5),
        task("hellaswag", published, 0),
    ]  # fmt: skip


def asked(task) -> list[tuple]:
    return [(one.doc_id, one.idx, one.args) for one in task.instances]


def test_scores_and_prompts_are_the_harness_s(data: Path) -> None:
    theirs = harness_tasks(data)
    names = [task.task_name for task in theirs]
    model, tokenizer = adapted(), bytes_tokenizer()
    lm = HFLM(pretrained=model, tokenizer=bytes_tokenizer(), batch_size=4)
    expected = simple_evaluate(
        lm, tasks=theirs, limit=2, log_samples=False, task_manager=TaskManager(include_defaults=False)
    )
    found = evaluate(model, tokenizer, names, data, limit=2, batch_size=4)
    for name in names:
        row = {key: value for key, value in expected["results"][name].items() if "," in key}
        assert found["tasks"][name]["metrics"] == ours._metrics(row) != {}
        assert found["tasks"][name]["docs"] == expected["n-samples"][name]["effective"] == 2
        assert found["tasks"][name]["shots"] == expected["n-shot"][name]
    loaded = load_tasks(check_tasks(names, data), data)["tasks"]
    for task in theirs:  # the texts as well: scores of a random model say little
        loaded[task.task_name].build_all_requests(limit=2)
        assert asked(loaded[task.task_name]) == asked(task) != []


def test_the_base_scores_as_in_the_harness(data: Path) -> None:
    theirs = [task for task in harness_tasks(data) if task.task_name in ("hellaswag", "mmlu_anatomy")]
    model, quiet = adapted(), TaskManager(include_defaults=False)
    base = model.unload()
    lm = HFLM(pretrained=base, tokenizer=bytes_tokenizer(), batch_size=4)
    expected = simple_evaluate(lm, tasks=theirs, limit=2, log_samples=False, task_manager=quiet)["results"]
    found = evaluate(base, bytes_tokenizer(), [task.task_name for task in theirs], data, limit=2, batch_size=4)
    for name, entry in found["tasks"].items():
        row = {key: value for key, value in expected[name].items() if "," in key}
        assert entry["metrics"] == ours._metrics(row) != {}
    assert len(found["tasks"]) == 2


def test_humaneval_differs_from_the_harness_s_in_metric_and_filter() -> None:
    for name, template in (("humaneval", "plain"), ("humaneval_instruct", "alpaca")):
        theirs = benchmarks.harness_index()[name].cfg
        made = task_settings("humaneval", "humaneval", template)
        changed = {key for key in theirs.keys() | made.keys() if theirs.get(key) != made.get(key)}
        assert changed - {"task"} == {"metric_list", "filter_list"}


def test_drop_s_examples_show_answers_and_the_harness_s_show_keys(data: Path) -> None:
    rows = {
        split: Dataset.from_list([drop_published(r) for r in some]) for split, some in read_rows("drop", data).items()
    }
    theirs = ConfigurableTask(config={**settings_of("drop"), "custom_dataset": lambda **_: rows, "num_fewshot": 1})
    assert theirs.doc_to_target(theirs.training_docs()[0]).startswith("number,")  # if this fails, the change can go
    task = load_tasks(check_tasks(["drop"], data), data)["tasks"]["drop"]
    assert task.doc_to_target(task.training_docs()[0]) == "20"


@pytest.mark.parametrize("right", [True, False])
def test_one_who_knows_all_scores_one(data: Path, right: bool) -> None:
    names = list(BENCHMARKS)
    found = values(Knowing(right), names, data, limit=2)
    for name in names:
        for metric, one in found[name].items():
            assert one["value"] == float(right), (name, metric)


def test_groups_are_means_weighted_by_size(data: Path, tmp_path: Path) -> None:
    rows = pq.read_table(data / "mmlu/test.parquet").to_pylist()
    more = [{**row, "answer": 0, "question": f"{i}"} for i, row in enumerate(rows) if row["subject"] == "anatomy"] * 20
    write(tmp_path, "mmlu/test", rows + more)
    write(tmp_path, "mmlu/dev", pq.read_table(data / "mmlu/dev.parquet").to_pylist())
    result = evaluate(llama(), bytes_tokenizer(), ["mmlu"], tmp_path, batch_size=64)["tasks"]["mmlu"]
    parts = result["subtasks"]
    assert len(parts) == 57 and parts["anatomy"]["docs"] == 63 and result["docs"] == 57 * 3 + 60
    total = sum(part["value"] * part["docs"] for part in parts.values())
    assert result["value"] == pytest.approx(total / result["docs"], abs=1e-12)
    assert result["value"] != pytest.approx(sum(part["value"] for part in parts.values()) / 57, abs=1e-3)
    assert result["metric"] == "acc" and result["stderr"] > 0


# Adapters, batches, and what must stay as it was


def test_residuals_see_padded_batches_rightly(data: Path) -> None:
    names, tokenizer = ["mmlu_anatomy", "hellaswag", "svamp"], bytes_tokenizer()
    said = {}
    for kind, model, batch in (("one", adapted(), 1), ("padded", adapted(), 7), ("base", llama(), 7)):
        loaded = load_tasks(check_tasks(names, data), data)
        with ours._quiet():
            ours._scores(ours._wrapped(model, tokenizer, batch, "plain"), loaded, None)
        said[kind] = {name: [one.resps[0] for one in loaded["tasks"][name].instances] for name in names}
    assert said["one"]["svamp"] == said["padded"]["svamp"] != said["base"]["svamp"]
    for name in ("mmlu_anatomy", "hellaswag"):
        likelihoods = {kind: torch.tensor([ll for ll, _ in some[name]]) for kind, some in said.items()}
        torch.testing.assert_close(likelihoods["one"], likelihoods["padded"], atol=1e-4, rtol=1e-5)
        assert (likelihoods["one"] - likelihoods["base"]).abs().max() > 0.1
    model, one = adapted(), loaded["tasks"]["hellaswag"].instances[1]  # and by hand, without the harness
    ids = tokenizer("".join(one.args), return_tensors="pt").input_ids
    n = len(tokenizer(one.args[1]).input_ids)
    logs = model(ids).logits[0, -n - 1 : -1].log_softmax(-1).gather(1, ids[0, -n:, None])
    torch.testing.assert_close(said["padded"]["hellaswag"][1][0], logs.sum().item(), atol=1e-3, rtol=1e-5)


def test_result_is_json_and_nothing_is_left_changed(data: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = adapted().train(), bytes_tokenizer()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = random.getstate(), torch.get_rng_state()
    result = evaluate(model, tokenizer, ["hellaswag", "mmlu_anatomy"], data, limit=1)
    assert (
        result == json.loads(json.dumps(result)) and result["harness"] == "lm-evaluation-harness " + lm_eval.__version__
    )
    assert modes == [module.training for module in model.modules()] and tokenizer.pad_token is None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr().err == ""
    again = evaluate(model, tokenizer, ["hellaswag", "mmlu_anatomy"], data, limit=1)
    assert again["tasks"] == result["tasks"] and result["settings"]["fewshot_seed"] == 1234
    text = markdown(result, subtasks=True)
    assert "InstructEval" in text and "lm-evaluation-harness" in text and "| hellaswag | acc |" in text
    assert "only the first 1 documents" in text


def test_prompts_that_are_cut_are_counted_and_no_room_is_refused(data: Path) -> None:
    result = evaluate(llama(200), bytes_tokenizer(), ["mmlu_anatomy", "hellaswag"], data)
    assert result["tasks"]["mmlu_anatomy"]["cut"] == 3 and result["tasks"]["hellaswag"]["cut"] == 0
    assert "3 of 3 prompts are too long" in markdown(result)
    assert evaluate(llama(2000), bytes_tokenizer(), ["mmlu_anatomy"], data)["tasks"]["mmlu_anatomy"]["cut"] == 0
    with pytest.raises(ValueError, match="gsm8k generates up to 256 tokens, and the model takes 200 with the prompt"):
        evaluate(llama(200), bytes_tokenizer(), ["gsm8k"], data)


def test_templates(data: Path) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    asked_in = {}
    for template in ("alpaca", "chat"):
        names = ["svamp", "humaneval", "mmlu_anatomy"]
        loaded = load_tasks(check_tasks(names, data, 1, True, template), data, template)
        lm = ours._wrapped(llama(), tokenizer, 1, template)
        for task in loaded["tasks"].values():
            task.build_all_requests(
                limit=1, apply_chat_template=True, fewshot_as_multiturn=template == "chat",
                chat_template=lm.apply_chat_template, tokenizer_name="",
            )  # fmt: skip
        asked_in[template] = {name: task.instances[0].args[0] for name, task in loaded["tasks"].items()}
    svamp = asked_in["alpaca"]["svamp"]
    assert svamp.startswith("Below is an instruction") and svamp.endswith("Answer:\n\n### Response:\n")
    assert svamp.count("### Instruction:") == 1 and svamp.count("Question:") == 6
    code = asked_in["alpaca"]["humaneval"]
    assert code.count("def f(x)") == 2 and code.index("### Response:") < code.rindex("def f(x)")
    assert "about anatomy" in asked_in["alpaca"]["mmlu_anatomy"]
    assert asked_in["chat"]["svamp"].count("<assistant>") == 5
    fenced = [{"prompt": "def f(x):\n"}], [["    return x\n```\nThis returns x."]]
    assert completed_answer(*fenced[::-1]) == [["def f(x):\n    return x\n"]]
    assert values(Knowing(), ["svamp", "humaneval"], data, 2, "plain")["humaneval"]["pass@1"]["value"] == 1


# Errors, before anything is loaded


def test_wrong_input(data: Path, tmp_path: Path) -> None:
    def refused(message: str, *arguments, error=ValueError) -> None:
        with pytest.raises(error, match=message):
            check_tasks(*arguments)

    refused("no task is called 'mmlu_pro'", ["mmlu_pro"])
    refused("list of different names", "mmlu")
    refused("list of different names", [])
    refused("list of different names", ["svamp", "svamp"])
    refused("mmlu_anatomy is part of mmlu", ["mmlu_anatomy", "mmlu"])
    for limit in (0, -1, True, 0.5):
        refused("limit is a number of documents", ["svamp"], data, limit)
    refused(r"without a sandbox: allow it with run_code=True", ["humaneval"], data)
    refused("run_code=True", ["humaneval"], data, None, 1)
    refused("unknown template 'x'", ["svamp"], data, None, False, "x")
    refused("no file .*svamp.train.parquet.*DIR/svamp/train.parquet", ["svamp"], tmp_path, error=FileNotFoundError)
    refused("no file", ["svamp"], tmp_path / "nowhere", error=FileNotFoundError)
    write(tmp_path, "gsm8k/train", [{"question": "a", "solution": "b"}])
    refused("has no column answer: it has question, solution", ["gsm8k"], tmp_path)
    (tmp_path / "svamp").mkdir()
    (tmp_path / "svamp/train.parquet").write_text("no parquet")
    refused("cannot be read as parquet", ["svamp"], tmp_path)
    for split in ("dev", "test"):
        rows = pq.read_table(data / f"mmlu/{split}.parquet").to_pylist()
        write(tmp_path, f"mmlu/{split}", [row for row in rows if row["subject"] != "virology"])
    refused("no rows with subject virology, which mmlu needs", ["mmlu"], tmp_path)
    assert check_tasks(["mmlu_anatomy"], tmp_path) == {"mmlu_anatomy": "mmlu"}
    write(tmp_path, "drop/validation", pq.read_table(data / "drop/validation.parquet").to_pylist()[:20])
    with pytest.raises(ValueError, match="drop has 10 passages: 10 are kept"):
        evaluate(llama(), bytes_tokenizer(), ["drop"], tmp_path)


def test_wrong_models(data: Path) -> None:
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(TypeError, match="causal language model of transformers, found BertForSequence"):
        evaluate(bert, bytes_tokenizer(), ["svamp"], data)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, or 'auto', found 0"):
        evaluate(llama(), bytes_tokenizer(), ["svamp"], data, batch_size=0)
    with pytest.raises(ValueError, match="no chat template"):
        evaluate(llama(), bytes_tokenizer(), ["svamp"], data, template="chat")
    with pytest.raises(ValueError, match="run_code=True"):
        evaluate(None, None, ["humaneval"], data)  # refused before the model is looked at


def test_without_the_harness_and_without_the_hub(monkeypatch) -> None:
    with pytest.raises(ConnectionError, match="rows of gsm8k cannot be fetched from the hub .*--data-dir"):
        evaluate(llama(), bytes_tokenizer(), ["gsm8k"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "lor2c\[eval\]"'):
        check_tasks(["svamp"])


# Code under limits


def alive(mark: str) -> bool:
    """Whether a process has `mark` among its arguments."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in file.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def test_programs_pass_or_fail() -> None:
    assert run_program("assert 1 + 1 == 2") == "passed"
    for source in (
        "assert 1 + 1 == 3", "def f(:", "import sys; sys.exit(0)", "import os; os._exit(0)", "exit(87 - 87)",
        "raise SystemExit", "def f(): f()\nf()",
    ):  # fmt: skip
        assert run_program(source) == "failed", source
    assert run_program("print('x' * 10**6)\nprint(input())") == "failed"  # nothing to read; output goes nowhere
    assert run_program("x = 'ü'\nassert len(x) == 1 and __name__ != '__main__'") == "passed"


def test_a_program_sees_no_environment_and_an_empty_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.chdir(tmp_path)
    assert run_program("import os\nassert os.listdir() == [] and 'SECRET_TOKEN' not in os.environ") == "passed"
    assert run_program("open('here', 'w').write('x')") == "passed" and list(tmp_path.iterdir()) == []


def test_a_program_has_no_rights_of_root_no_children_and_no_network() -> None:
    """As root, 300 forks went through and a daemon outlived the run."""
    assert run_program("import os\nassert os.getuid() != 0 and os.geteuid() != 0") == "passed"
    forks = "import os\nfor _ in range(300):\n    try:\n        os.fork()\n    except OSError:\n        break\nelse:\n    1 / 0"
    assert run_program(forks) == "passed"
    assert run_program("import os\nos.setuid(0)") == "failed"
    for path in (ROOT / "README.md", Path(sys.executable)) if os.geteuid() == 0 else ():
        assert run_program(f"open({str(path)!r}, 'ab')") == "failed"
        assert run_program(f"open({str(path)!r}, 'rb').read(1)") == "passed"
    if run_program("import os\nassert os.getpid() == 1") == "passed":  # else the system offers no namespaces
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            assert run_program(f"import socket\nsocket.create_connection({address}, 1)") == "failed"
    check_code(True)


def test_code_is_refused_where_root_stays_root(monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(humaneval, "run_program", lambda source: "failed")
    with pytest.raises(ValueError, match="would run as root, whose rights cannot be dropped here"):
        check_code(True)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.warns(UserWarning, match="no namespaces here, so the code that humaneval runs can use the network"):
        check_code(True)


def test_a_program_that_never_ends() -> None:
    start = time.monotonic()
    assert run_program("import time\nwhile True: time.sleep(1)", seconds=1) == "timed out"
    assert (
        run_program("try:\n    while True: pass\nexcept BaseException: pass\nwhile True: pass", seconds=1) != "passed"
    )
    assert time.monotonic() - start < 6


def test_a_program_cannot_have_all_memory_or_disk() -> None:
    assert run_program("x = bytearray(200 << 20)", memory=1 << 30) == "passed"
    assert run_program("x = bytearray(2 << 30)", memory=1 << 30) == "failed"
    assert run_program("open('f', 'wb').write(b'x' * (1 << 19))") == "passed"
    assert run_program("open('f', 'wb').write(b'x' * (4 << 20))") == "failed"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks into /proc")
@pytest.mark.parametrize("ending", ["", "assert False", "while True: pass"])
def test_children_do_not_outlive_a_program(ending: str) -> None:
    mark = f"6{random.randrange(10**8)}.5"
    source = f"import subprocess\nchild = subprocess.Popen(['sleep', '{mark}'])\nassert child.poll() is None\n{ending}"
    assert run_program(source, seconds=3) == "failed"
    time.sleep(0.2)
    assert not alive(mark)


# All of it, and real rows where there are any


@pytest.mark.skipif(not REAL.is_dir(), reason="no real rows here")
def test_real_rows(tmp_path: Path) -> None:
    names = list(BENCHMARKS)
    found = values(Knowing(), names, REAL, limit=2)
    for name in names:
        first = BENCHMARKS[name].metric
        assert found[name][first]["value"] == 1.0, name
    published = {row["task"]: row["cot_prompt"] for row in pq.read_table(REAL / "bbh/prompts.parquet").to_pylist()}
    tasks = load_tasks(check_tasks(["bbh"], REAL), REAL)["tasks"].values()
    same = 0
    for task in tasks:
        doc = task.eval_docs[0]
        before = published[task.config.dataset_name].partition("-----\n")[2].strip()
        same += task.fewshot_context(doc, 3) == f"{before}\n\nQ: {doc['input']}\nA: Let's think step by step.\n"
    assert same == 26  # sports_understanding has a line break where the published prompt has a space


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no real rows here")
def test_all_real_rows_with_all_answers_known() -> None:
    found = values(Knowing(), list(BENCHMARKS), REAL, limit=None)
    for name, metrics in found.items():
        assert metrics[BENCHMARKS[name].metric]["value"] == 1.0, (name, metrics)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no real rows here")
def test_real_rows_score_as_in_the_harness() -> None:
    model, tokenizer = adapted(), bytes_tokenizer()
    names = ["mmlu", "hellaswag", "drop", "gsm8k", "svamp", "humaneval", *list(benchmarks.subtasks_of("bbh"))[:3]]
    result = evaluate(model, tokenizer, names, REAL, limit=2, batch_size=4, run_code=True)
    loaded = load_tasks(check_tasks(names, REAL, 2, True), REAL)
    tasks = [loaded["groups"]["mmlu"], *(loaded["tasks"][name] for name in names if name != "mmlu")]
    expected = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=tasks, limit=2, log_samples=False,
        confirm_run_unsafe_code=True, task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    for name in names:
        assert result["tasks"][name]["metrics"] == ours._metrics(expected["results"][name])
    for task, subtask in benchmarks.subtasks_of("mmlu").items():
        assert result["tasks"]["mmlu"]["subtasks"][subtask]["metrics"] == ours._metrics(expected["results"][task])
