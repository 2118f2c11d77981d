"""What builds the site: plain nbdev reads the notebooks, and `make docs` takes a Quarto that is new enough."""

import inspect
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import BIN, ROOT

import lor2c


def with_quarto(folder: Path, version: str) -> dict[str, str]:
    """The environment of a machine where this version of Quarto is installed."""
    quarto = folder / "quarto"
    quarto.write_text(f"#!/bin/sh\necho {version}\n")
    quarto.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{BIN}:{os.environ['PATH']}"}


@pytest.mark.parametrize("config", [lor2c.LoR2CConfig, lor2c.ResLoRAConfig])
def test_types_of_a_configuration_can_be_read(config: type) -> None:
    """As nbdev and other tools read them; PEFT's own fields have strings for types."""
    parameters = inspect.signature(config, eval_str=True).parameters
    assert parameters["r"].annotation is int and parameters["inference_mode"].annotation is bool
    assert typing.get_type_hints(config.__init__)["auto_mapping"] == dict | None


def test_plain_nbdev_shows_the_reference(repository: Path, tmp_path: Path) -> None:
    command = [BIN / "nbdev_proc_nbs", "--path", "nbs/api/tuners", "--n_workers", "0"]
    done = subprocess.run(command, cwd=repository, env=with_quarto(tmp_path, "1.9.0"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = json.loads((repository / "_proc/02_config.ipynb").read_text("utf-8"))["cells"]
    outputs = "".join(str(out["data"]) for cell in shown for out in cell.get("outputs", []) if "data" in out)
    assert "inference_mode:bool=False" in outputs


@pytest.mark.parametrize(("version", "fits"), [("1.8.27", False), ("1.11.0", True)])
def test_quarto_is_new_enough(version: str, fits: bool, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import docs; print(docs.quarto_fits())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=with_quarto(tmp_path, version), capture_output=True, text=True
    )
    assert done.stdout.strip() == str(fits), done.stderr
    said = f"Quarto {version} is on the PATH, but the site needs >=1.9: smalldocs renders\n"
    assert done.stderr.endswith(said) is not fits
