"""The examples in the docstrings of what `import lor2c` gives run, offline and fast, and the docstrings tell every argument."""

import doctest
import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from time import process_time

import pytest

import lor2c

LIMIT = 3  # seconds of computing for the examples of one name, however busy the machine is
CLASSES = ("LoR2CConfig", "LoR2CLayer", "LoR2CModel", "ResLoRAConfig", "ResLoRAModel")


def examples(name: str) -> list[doctest.DocTest]:
    obj = getattr(lor2c, name)
    found = doctest.DocTestFinder(exclude_empty=True).find(obj, name, module=sys.modules[obj.__module__])
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", lor2c.__all__)
def test_examples_run(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = examples(name)  # loads the name's module, which is not what is timed
    start = process_time()
    for test in tests:
        said: list[str] = []
        assert runner.run(test, out=said.append).failed == 0, "".join(said)
    assert process_time() - start < LIMIT
    assert name not in CLASSES or runner.tries, "an example in its docstring"


@pytest.mark.parametrize("name", CLASSES)
def test_docstring_tells_every_argument(name: str) -> None:
    cls = getattr(lor2c, name)
    doc = inspect.getdoc(cls)
    told = re.findall(r"^    (\w+): ", doc.partition("Args:\n")[2].partition("\n\n")[0], re.M)
    own = [f.name for f in fields(cls) if f.name in cls.__annotations__] if is_dataclass(cls) else None
    assert told == (own or list(inspect.signature(cls).parameters))
    assert "\nRaises:\n" in doc and re.search(r"^    (\w+, )?ValueError: ", doc, re.M)
    assert doc.rpartition("\n")[2].startswith("Source: ")
