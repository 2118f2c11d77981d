"""The examples in docstrings run as they stand, and say what they say."""

import doctest
from importlib import import_module

import pytest

import lor2c

EXAMPLES = {
    "lor2c.training.surgery": ["inject_lora", "merge_modules"],
    "lor2c.training.imlor2c": ["IMCallback"],
    "lor2c.training.rm_lora": ["RMLoRACallback"],
}


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples(module):
    found = [test for test in doctest.DocTestFinder().find(import_module(module)) if test.examples]
    assert sorted(test.name.removeprefix(f"{module}.") for test in found) == EXAMPLES[module]
    assert all(getattr(lor2c, name).__module__ == module for name in EXAMPLES[module])
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.failures == 0 and runner.tries >= 5
