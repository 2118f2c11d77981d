"""IMCallback in Trainers and in a loop: the decisions, the two sets of rules, and what it refuses."""

import json
import math
import shutil
import warnings

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from tiny import DECODER, batch, build, words_and_rows
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import lor2c
from lor2c.maths.layout import Layout
from lor2c.training.decisions import Settings, choose, scores_by
from lor2c.training.imlor2c import IMCallback
from lor2c.training.wrappers import tuner_of

LAYERS = 6


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int = 12) -> None:
        self.ids = torch.randint(3, 64, (n, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return dict(input_ids=self.ids[i], labels=self.ids[i])


def model_of(layers: int = LAYERS, **config):
    set_seed(0)
    base = T.LlamaForCausalLM(T.LlamaConfig(**{**DECODER, "num_hidden_layers": layers}))
    return get_peft_model(base, lor2c.LoR2CConfig(**dict(r=4, alpha=8, dropout=0.0, task_type="CAUSAL_LM") | config))


def trainer_of(folder, callback, model=None, callbacks=(), **changes):
    settings = dict(
        num_train_epochs=8, per_device_train_batch_size=4, learning_rate=2e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    args = TrainingArguments(folder, **settings | changes)
    return Trainer(model or model_of(), args, train_dataset=Rows(), callbacks=[callback, *callbacks])


def moves(callback) -> list[tuple]:
    return [(e["step"], e["move"]["kind"], e["move"]["what"]) for e in callback.history if e["move"]]


class Seed(TrainerCallback):
    """The injected A is drawn from torch's generator: the same numbers for a Trainer and for a loop."""

    def on_optimizer_step(self, *_, **__) -> None:
        set_seed(7)


class Watch(TrainerCallback):
    """Every trained value after each step."""

    def __init__(self) -> None:
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    def unmoved(self, first: int, last: int, part: str = "") -> list[str]:
        """Tensors that are the same after two steps (counted from 1) and hold `part` in their name."""
        before, after = self.seen[first - 1], self.seen[last - 1]
        return [n for n in after if part in n and n in before and torch.equal(before[n], after[n])]


@pytest.mark.parametrize("share", [False, True], ids=["own A", "shared A"])
def test_every_parameter_learns_after_every_move(tmp_path, share):
    """In a Trainer, within ten steps of each decision."""
    watch, callback = Watch(), IMCallback(2, 2)
    trainer_of(tmp_path, callback, model_of(share=share), [watch]).train()
    assert moves(callback) == [(3, "merge", "done"), (3, "inject", "done"), (6, "merge", "done"), (6, "inject", "done")]
    for step in (3, 6):
        assert watch.unmoved(step, step + 10 if step == 6 else 6) == []
    last = watch.seen[-1]
    assert sum("lora_" in name for name in last) == 8 and sum("lor2c_B" in name for name in last) == LAYERS - 4


def test_the_reference_rules_do_what_the_reference_code_does(tmp_path):
    """Mean of all d singular values; the lowest sum merges; the first pair stays; the highest is injected; none of it learns."""
    watch, callback = Watch(), IMCallback(2, 2, rules="reference")
    trainer_of(tmp_path, callback, None, [watch]).train()
    done = [e for e in callback.history if e["move"] and e["move"]["what"] == "done"]
    merges = [e for e in done if e["move"]["kind"] == "merge"]
    assert all(e["move"]["kept"].startswith("first") for e in merges)
    for entry in done:
        scores = {tuple(one["layers"]): one["score"] for one in entry["residuals"]}
        a, b = entry["move"]["layers"]
        if entry["move"]["kind"] == "inject":
            assert scores[a, b] == max(score for (x, y), score in scores.items() if x == y)
        else:
            pairs = {(x, v): scores[x, y] + scores[u, v] for (x, y) in scores for (u, v) in scores if y + 1 == u}
            assert pairs[a, b] == min(pairs.values())
    last = watch.seen[-1]
    assert any("lora_B" in n for n in last) and not any(last[n].any() for n in last if "lora_B" in n)
    assert watch.unmoved(7, 24, "lora_") == [n for n in last if "lora_" in n]
    (a, b) = next(span for span in callback.history[-1]["spans"] if span[0] < span[1])
    assert sorted(watch.unmoved(7, 24, f"layers.{b}.lor2c")) == sorted(n for n in last if f"layers.{b}.lor2c" in n)
    single = [b for a, b in callback.history[-1]["spans"] if a == b]
    assert all(watch.unmoved(7, 24, f"layers.{layer}.lor2c") == [] for layer in single)


def test_rules_choose_the_opposite_on_the_same_spectra():
    """With sfs_k the reference merges what the paper would keep."""
    values = {0: [4.0, 0.1], 1: [4.0, 0.1], 2: [2.0, 2.0], 3: [2.0, 1.9]}  # two concentrated, two spread out
    spectra, layout = {t: torch.tensor(v) for t, v in values.items()}, Layout(4, ((0, 0), (1, 1), (2, 2), (3, 3)))
    chosen = {}
    for rules in ("paper", "reference"):
        settings = Settings(1, 1, rules=rules, sfs_k=1)
        scores = scores_by(settings, spectra, 16)
        chosen[rules] = choose(settings, "merge", layout, scores), choose(settings, "inject", layout, scores)
    assert (chosen["paper"][0]["first"], chosen["reference"][0]["first"]) == (0, 2)
    assert chosen["reference"][0]["keep"] == "first" and chosen["paper"][0]["keep"] == "first"
    assert (chosen["paper"][1]["layer_idx"], chosen["reference"][1]["layer_idx"]) == (0, 0)
    mean = scores_by(Settings(rules="reference"), spectra, 16)
    assert mean[0] == pytest.approx(4.1 / 16)


def test_due_without_a_legal_move_is_written_down(tmp_path):
    """Upper limits: the run warns, records it, and goes on."""
    callback = IMCallback(3, 3)
    with pytest.warns(UserWarning, match="need at least 7 layers with a residual, the model has 3"):
        trainer_of(tmp_path, callback, model_of(3), num_train_epochs=12).train()
    assert (9, "merge", "no legal move") in moves(callback) and len(moves(callback)) == 6
    assert callback.history[-1]["step"] == 36


def test_a_due_decision_that_was_never_taken_is_an_error():
    model, callback = model_of(), IMCallback(1, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    callback.begin(model, steps=24, steps_per_epoch=3)
    callback.step = 10  # a loop that does not call after_step
    with pytest.raises(RuntimeError, match="the merge due at step 6 was never taken"):
        callback.finish()
    callback = IMCallback(1, 0)
    callback.begin(model, steps=24, steps_per_epoch=3)
    for _ in range(10):
        callback.before_step(model)
        callback.after_step(model, optimizer)
    callback.finish()


def test_a_micro_batch_is_no_step():
    """Accumulated gradients wait: refused at the first micro-batch; with gradients that are zero and not None, no step is."""
    model, callback = model_of(), IMCallback(1, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    callback.begin(model, steps=24, steps_per_epoch=3)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match="gradients that wait for their step.*not after a micro-batch"):
        callback.after_step(model, optimizer)
    assert callback.step == 0
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    callback.after_step(model, optimizer)
    assert callback.step == 1


def test_limits_that_do_not_fit_are_said_and_not_switched(tmp_path):
    """Three epochs have room for two merges by Eq. 11; 'fractional' is never taken without being asked for."""
    callback = IMCallback(3, 0)
    with pytest.warns(UserWarning, match="2 of 3 merge decisions fit into the run.*schedule='fractional'"):
        trainer_of(tmp_path, callback, num_train_epochs=3).train()
    assert [step for step, *_ in moves(callback)] == [3, 6]
    callback = IMCallback(3, 0, schedule="fractional")
    trainer_of(tmp_path, callback, num_train_epochs=8).train()
    assert [step for step, *_ in moves(callback)] == [2, 4, 6]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loop_of_ones_own_ends_as_the_trainer(tmp_path, accumulation):
    """The same lines around accelerate's backward and step give the same bits as Trainer."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    wanted = IMCallback(1, 1)
    trainer = trainer_of(
        tmp_path, wanted, callbacks=[Seed()], gradient_accumulation_steps=accumulation, weight_decay=0.01,
        lr_scheduler_type="constant", max_grad_norm=0.0, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()

    model, callback = model_of(), IMCallback(1, 1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.01, fused=True)
    loader = DataLoader(Rows(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    per_epoch = math.ceil(len(loader) / accumulation)
    callback.begin(model, 8 * per_epoch, per_epoch, optimizer)
    model.train()
    for _ in range(8):
        batches = list(loader)
        for i in range(0, len(batches), accumulation):
            group = batches[i : i + accumulation]
            tokens = sum((b["labels"][:, 1:] != -100).sum() for b in group)
            for b in group:
                accelerator.gradient_state._set_sync_gradients(True)
                loss = model(**b, num_items_in_batch=tokens).loss
                loss.backward()
            callback.before_step(model)
            optimizer.step()
            optimizer.zero_grad()
            set_seed(7)
            callback.after_step(model, optimizer)
    callback.finish()
    assert [e["move"] for e in callback.history] == [e["move"] for e in wanted.history]
    assert tuner_of(model).layout() == tuner_of(trainer.model).layout() and len(tuner_of(model).layout().injected) == 1
    mine, theirs = (dict(m.named_parameters()) for m in (model, trainer.model))
    for name, p in theirs.items():
        assert torch.equal(mine[name], p), name


def test_in_trl(tmp_path):
    """SFTTrainer wraps the model itself; the structure changes all the same."""
    trl = pytest.importorskip("trl")
    tokenizer, rows = words_and_rows()
    args = trl.SFTConfig(
        tmp_path, num_train_epochs=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, max_length=16, save_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    callback, watch = IMCallback(1, 1), Watch()
    trainer = trl.SFTTrainer(
        build("Llama"), args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback, watch],
        peft_config=lor2c.LoR2CConfig(r=4, dropout=0.0, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    assert moves(callback) == [(8, "merge", "done"), (8, "inject", "done")]
    assert watch.unmoved(8, 18) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(max_merges=-1), "max_merges must be a whole number of at least 0, found -1"),
        (dict(max_injections=1.5), "max_injections must be a whole number"),
        (dict(rules="code"), "unknown rules 'code': choose one of paper, reference"),
        (dict(keep="both"), "unknown keep 'both': choose one of more_information, first, second"),
        (dict(score="rank"), "unknown score 'rank': choose one of sfs, mean"),
        (dict(schedule="steps"), "unknown schedule 'steps': choose one of epoch, fractional"),
        (dict(inject="middle"), "unknown inject 'middle'"),
        (dict(longest=1), "longest must be a whole number of at least 2"),
        (dict(longest=2.5), "longest must be a whole number of at least 2"),
        (dict(inject_r=0), "rank of injected LoRA must be a whole number of at least 1, found 0"),
        (dict(inject_r=2.0), "rank of injected LoRA must be a whole number of at least 1, found 2.0"),
        (dict(inject_alpha=0), "alpha of injected LoRA must be above 0"),
        (dict(rules="reference", keep="second"), "rules='reference' decides about keep"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        IMCallback(**arguments)


def test_models_that_cannot_change_are_refused_before_training(tmp_path):
    """No LoR2C, no q and v, a k beyond the rank, nothing that says how long an epoch is."""
    lora = get_peft_model(build("Llama"), LoraConfig(task_type="CAUSAL_LM"))
    plain = torch.nn.Module()
    plain.config = T.PretrainedConfig(hidden_size=16)
    plain.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()) for _ in range(3))
    blocks = get_peft_model(plain, lor2c.LoR2CConfig(r=4, layers="blocks"))
    for attempt, kind, message in [
        (lambda: IMCallback().begin(lora, 10, 1), TypeError, "a LoR2C model is needed"),
        (
            lambda: IMCallback(0, 1).begin(blocks, 10, 1),
            ValueError,
            "found no query and value projections.*Its linear modules: 0",
        ),
        (lambda: IMCallback(sfs_k=4).begin(model_of(), 10, 1), ValueError, "k of SFS must be a whole number from 1 to"),
        (lambda: IMCallback().begin(model_of(r=1), 10, 1), ValueError, "use score='mean'"),
        (lambda: IMCallback().begin(model_of(), 10), ValueError, "use 'fractional'"),
        (
            lambda: IMCallback().begin(torch.nn.DataParallel(model_of()), 10, 1),
            TypeError,
            "one process per GPU with torchrun",
        ),
    ]:
        with pytest.raises(kind, match=message):
            attempt()
    fits = model_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IMCallback(1, 0).begin(fits, 24, 3)


def test_resuming_what_does_not_fit_is_refused_and_changes_no_file(tmp_path):
    """Another model, other settings, a run without the callback, a damaged checkpoint."""
    trainer_of(tmp_path, IMCallback(1, 1), save_strategy="epoch").train()
    whole = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    checkpoint = tmp_path / "checkpoint-12"

    def resume(callback, model=None, folder=checkpoint, **changes):
        trainer_of(tmp_path / "other", callback, model, **changes).train(resume_from_checkpoint=str(folder))

    with pytest.raises(
        ValueError, match="cannot be resumed with other settings of IMCallback: max_merges was 1, now 2"
    ):
        resume(IMCallback(2, 1))
    with pytest.raises(
        RuntimeError, match="a decision of step 6, merge, that this training has not: .* rows of a batch"
    ):
        resume(IMCallback(1, 1), per_device_train_batch_size=6)
    with pytest.raises(ValueError, match="the adapter does not fit: it has a depth of 6, this model has 4"):
        resume(IMCallback(1, 1), model_of(4))
    with pytest.raises(ValueError, match="rank 4, this model has 2"):
        resume(IMCallback(1, 1), model_of(r=2))
    blank = tmp_path / "blank"
    shutil.copytree(checkpoint, blank)
    state = json.loads((blank / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["IMCallback"]
    (blank / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(
        RuntimeError, match="the merge due at step 6 was never taken: the checkpoint does not know of it"
    ):
        resume(IMCallback(1, 1), folder=blank)
    (blank / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(Exception, match="header|deserializing|Error"):
        resume(IMCallback(1, 1), folder=blank)
    assert lor2c.last_complete_checkpoint(tmp_path / "blank") is None
    shutil.rmtree(blank)
    assert {p: p.read_bytes() for p in whole} == whole


def test_two_trainings_with_one_callback(tmp_path):
    """A second train() starts with an empty history, on the structure it finds."""
    callback = IMCallback(1, 0)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    first, before = len(callback.history), moves(callback)
    trainer.train()
    assert moves(callback) == before == [(6, "merge", "done")] and len(callback.history) == first
    assert len(tuner_of(trainer.model).layout().spans) == LAYERS - 2


def test_the_history_says_what_was_seen(tmp_path):
    """Scores and gradients of all residuals at every epoch and decision, in the trainer's state, as JSON."""
    callback = IMCallback(1, 1)
    trainer = trainer_of(tmp_path, callback, save_strategy="epoch")
    trainer.train()
    stored = json.loads((tmp_path / "checkpoint-24" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["IMCallback"]["attributes"]["history"] == callback.history
    assert [e["epoch"] for e in callback.history] == [1, 2, 2, 3, 4, 5, 6, 7, 8]
    for entry in callback.history:
        assert all(0 <= one["score"] < 1 and one["gradient"] > 0 for one in entry["residuals"])
    merged = next(e for e in callback.history if e["move"])
    sums = {
        (low["layers"][0], high["layers"][1]): low["score"] + high["score"]
        for low, high in zip(merged["residuals"], merged["residuals"][1:], strict=False)
    }
    assert tuple(merged["move"]["layers"]) == min(sums, key=sums.get)
    assert callback.history[0]["parameters"] - callback.history[-1]["parameters"] == 2 * 16 * 4 + 16 * 4 * 2 - 2 * (
        32 + 24
    )


def test_nothing_is_decided_where_both_limits_are_zero(tmp_path):
    """(0, 0) of the grid is LoR2C itself, to the bit."""
    with_callback = trainer_of(tmp_path, IMCallback(0, 0))
    with_callback.train()
    plain = Trainer(model_of(), with_callback.args, train_dataset=Rows())
    plain.train()
    want = dict(plain.model.named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in with_callback.model.named_parameters())
    assert batch("Llama").keys() == {"input_ids", "attention_mask", "labels"}


def test_an_optimizer_of_an_earlier_structure_is_refused(tmp_path):
    """A Trainer keeps its optimizer: resumed from before a move, it would train what is gone. A new one is right."""
    callback = IMCallback(1, 1)
    trainer = trainer_of(tmp_path, callback, save_strategy="epoch")
    trainer.train()
    want = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match="the optimizer lacks 6 of the adapter's 12 trained.*trainer.optimizer = None"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(p, want[name]) for name, p in trainer.model.named_parameters())
    other = torch.optim.AdamW(model_of().parameters())
    with pytest.raises(ValueError, match="the optimizer lacks 12 of the adapter's 12"):
        IMCallback(1, 1).begin(model_of(), 24, 3, other)


def test_one_callback_decides(tmp_path):
    with pytest.raises(ValueError, match="one IMCallback decides about a model's structure, found 2"):
        trainer_of(tmp_path, IMCallback(1, 0), None, [IMCallback(0, 1)]).train()


def test_only_layers_with_a_residual_count():
    """Limits are compared with the residuals there are, and only their layers need q and v."""
    with pytest.warns(UserWarning, match="need at least 5 layers with a residual, the model has 2"):
        IMCallback(2, 2).begin(model_of(spans=[[0, 0], [1, 1]]), 24, 3)
    model = model_of(spans=[[0, 0], [1, 1]])
    del model.base_model.model.model.layers[5].self_attn.v_proj
    IMCallback(0, 1).begin(model, 24, 3)


def test_the_gradient_in_the_history_is_that_of_the_pair_that_went_on(tmp_path):
    """A merge and an injection at the same step: the second entry shows the merged residual with its own gradient."""
    callback = IMCallback(1, 1, keep="second")
    trainer_of(tmp_path, callback).train()
    merge, inject = (entry for entry in callback.history if entry["move"])
    a, b = merge["move"]["layers"]
    seen = {tuple(one["layers"]): one["gradient"] for one in merge["residuals"]}
    kept = next(gradient for (_, end), gradient in seen.items() if end == b)
    merged = next(one["gradient"] for one in inject["residuals"] if one["layers"] == [a, b])
    assert merged == kept != seen[a, a]


def test_a_diverged_residual_is_an_error_in_words():
    model = model_of()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    callback = IMCallback(1, 0)
    callback.begin(model, 24, 3, optimizer)
    next(p for name, p in model.named_parameters() if "lor2c_B" in name).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite: training diverged, try a smaller learning rate"):
        for _ in range(6):
            callback.before_step(model)
            callback.after_step(model, optimizer)
