"""The floor of plain functions stands on torch alone."""

import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = sorted(f"lor2c.maths.{path.stem}" for path in (ROOT / "lor2c/maths").glob("[a-z]*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_maths_imports_neither_peft_nor_transformers(module: str) -> None:
    code = f"import {module}, sys; assert 'peft' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
