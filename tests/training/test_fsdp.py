"""FSDP 2 by a Trainer's ordinary configuration, two processes with gloo, beside DistributedDataParallel."""

from pathlib import Path

import pytest
from training.test_processes import TORCHRUN, far, read, start, succeeded

WORKER = Path(__file__).parents[1] / "workers" / "fsdp.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    succeeded(start(*TORCHRUN, WORKER, folder))
    return folder


@pytest.mark.parametrize("name", ["fsdp", "resumed"])
def test_moves_and_masks_are_those_of_distributed_data_parallel(folder, name):
    """Undisturbed, or resumed after both moves from the adapter that a checkpoint has."""
    found = read(folder, "fsdp")
    expected, found = found["ddp"], found[name]
    moves = [[sorted(map(str, move)) for move in one["moves"]] for one in (found, expected)]
    assert moves[0] == moves[1] and [move[1] for move in expected["moves"]] == ["merge", "inject"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6) and len(found["losses"]) == 12
    assert far(found["parameters"], expected["parameters"]) < 1e-6
    assert far(found["parameters"], read(folder, "fsdp", 1)[name]["parameters"]) == 0
    assert found["optimizer holds the trained"]


def test_what_comes_later_is_a_unit_of_its_own(folder):
    """A merged residual and one that stayed, A and B of q and v, four layers."""
    units = read(folder, "fsdp")["fsdp"]["units"]
    assert [units.count(f"FSDP{kind}") for kind in ("LoR2CLayer", "LlamaDecoderLayer")] == [2, 4]
    assert units.count("FSDPLinear") >= 4


@pytest.mark.parametrize(
    "misuse, sentence",
    [
        ("not apart", "in a Trainer add LoR2CLayer to transformer_layer_cls_to_wrap of its fsdp_config"),
        ("best", "leave out load_best_model_at_end, and give the best checkpoint to PeftModel.from_pretrained"),
    ],
)
def test_what_cannot_work_is_refused_before_training(folder, misuse, sentence):
    for rank in (0, 1):
        assert sentence in read(folder, "fsdp", rank)[misuse]
