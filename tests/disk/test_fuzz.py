"""A minute of damaged adapters; `python tests/disk/fuzz.py` takes more."""

from fuzz import fuzz


def test_damaged_adapters_are_refused_or_the_same_model():
    counts, faults = fuzz(damages=5000, seconds=60)
    assert not faults, "\n".join(f"{number} {fault}" for number, fault in faults.items())
    assert counts["refused"] > counts["same"] > 0
