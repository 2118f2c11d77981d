"""DeepSpeed's ZeRO in a plain Trainer, two processes with gloo, beside DistributedDataParallel."""

import importlib.util
from pathlib import Path

import pytest
from training.test_processes import TORCHRUN, far, read, start, succeeded

WORKER = Path(__file__).parents[1] / "workers" / "zero.py"
RUNS = [
    *("ddp", "ddp rm", "ddp plain", "zero1", "zero2 best", "zero2 from 2", "zero2 from 8", "zero2 rm", "zero3"),
    "refused",
]
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    succeeded(start(*TORCHRUN, WORKER, folder, *RUNS))
    return folder


@pytest.mark.parametrize("name", ["zero1", "zero2 from 2", "zero2 from 8"])
def test_a_merge_is_that_of_distributed_data_parallel(runs, name):
    """To the last bit, undisturbed, or resumed from before or after the merge; ZeRO adds up norms in another order."""
    expected, found = read(runs, "ddp"), read(runs, name)
    assert found["optimizer"] == "DeepSpeedZeroOptimizer" and found["layout"] == expected["layout"] == "[0] [1] [2..3]"
    assert found["losses"] == expected["losses"] and len(found["losses"]) == 12
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert (
        far(found["parameters"], expected["parameters"])
        == 0
        == far(found["parameters"], read(runs, name, 1)["parameters"])
    )
    assert [entry["move"] for entry in found["history"]] == [entry["move"] for entry in expected["history"]]


def test_gradients_that_zero_took_away_are_not_in_the_history(runs):
    norms = {
        name: [r["gradient"] for e in read(runs, name)["history"] for r in e["residuals"]] for name in ("ddp", "zero1")
    }
    assert all(norms["ddp"]) and set(norms["zero1"]) == {None}


def test_the_best_model_has_its_own_structure(runs):
    for rank in (0, 1):
        found = read(runs, "zero2 best", rank)
        assert found["best"].endswith("checkpoint-2") and found["layout"] == "[0] [1] [2] [3]"
        loaded = {name.replace(".default", ""): p for name, p in found["parameters"].items()}
        assert far(loaded, {name: p for name, p in found["saved"].items() if name in loaded}) == 0


@pytest.mark.parametrize("name, twin", [("zero2 rm", "ddp rm"), ("zero3", "ddp plain")])
def test_equal_but_for_rounding(runs, name, twin):
    """RM-LoRA over two accumulated batches in hooks of the gradients; LoR2C alone under stage 3."""
    expected, found = read(runs, twin), read(runs, name)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert far(found["parameters"], expected["parameters"]) < 1e-6
    if "rm" in name:
        assert [e["step"] for e in found["history"]] == [e["step"] for e in expected["history"]]


@pytest.mark.parametrize(
    "misuse, sentence",
    [
        ("inject", "under ZeRO leave out max_injections, merges alone work there: DeepSpeed fixes the parameters"),
        ("budget", "under ZeRO leave out keep='fitted', budget and tolerance"),
        ("reference", "under ZeRO leave out rules='reference'"),
        ("update", "under ZeRO, RM-LoRA works on gradients alone: choose mask='gradient'"),
        ("clip", "let DeepSpeed clip with the Trainer's max_grad_norm"),
        ("stage 3", "only ZeRO stages 1 and 2 allow merges"),
        ("stage 3, rm", "use DistributedDataParallel, FSDP 2 (fully_shard) or ZeRO stage 1 or 2"),
    ],
)
def test_what_zero_cannot_do_is_refused_before_training(runs, misuse, sentence):
    for rank in (0, 1):
        assert sentence in read(runs, "refused", rank)[misuse]
