"""FSDP 2 by a Trainer's ordinary configuration, two processes with gloo."""

from pathlib import Path

import pytest
from training.test_processes import TORCHRUN, far, read, start, succeeded

WORKER = Path(__file__).parents[1] / "workers" / "fsdp.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    succeeded(start(*TORCHRUN, WORKER, folder))
    return folder


def test_a_trainer_shards_residuals_as_units(folder):
    found = read(folder, "fsdp")
    assert found["fsdp"]["units"].count("FSDPLoR2CLayer") == 4 == found["fsdp"]["units"].count("FSDPLlamaDecoderLayer")
    assert found["fsdp"]["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-6)
    assert far(found["fsdp"]["parameters"], found["ddp"]["parameters"]) < 1e-6


def test_a_move_is_refused_before_training(folder):
    for rank in (0, 1):
        assert (
            "shard_residuals(model, mesh=...) before fully_shard on the layers" in read(folder, "fsdp", rank)["merge"]
        )
