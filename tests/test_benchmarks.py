"""Benchmarks that wait for a machine which is not always there are rehearsed at their smallest size."""

import subprocess
import sys
from pathlib import Path

from lor2c.disk.files import read_jsonl

GPU = Path(__file__).parents[1] / "benchmarks/gpu.py"


def test_the_gpu_script_on_a_cpu(tmp_path):
    """Every check of the contract that this size has passes, and each method has its step beside LoRA's."""
    command = [sys.executable, GPU, "--device", "cpu", "--size", "tiny", "--output", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    contract, step = (read_jsonl(tmp_path / f"cpu-{section}.jsonl") for section in ("contract", "step"))
    assert [r for r in contract if r["passed"] is False] == [] and sum(r["passed"] is True for r in contract) >= 6
    ratios = {r["name"]: r.get("seconds_of_lora") for r in step}
    assert ratios["lora"] == 1 and len(ratios) == 10 and all(0 < ratio < 100 for ratio in ratios.values())


def test_it_says_what_a_section_needs(tmp_path):
    """An unknown section and one without its rows are refused before anything runs."""
    for words, what in ((["--sections", "speed"], "no section 'speed'"), (["--sections", "glue"], "--glue-dir")):
        done = subprocess.run([sys.executable, GPU, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and what in done.stderr


def test_the_growth_of_cost(tmp_path):
    """Each size and a group of two processes leave a record, with every time and the bytes of the gradients."""
    file = tmp_path / "growth.jsonl"
    done = subprocess.run(
        [sys.executable, GPU.with_name("growth.py"), "--tiny", "--output", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    *sizes, group = read_jsonl(file)
    assert [r["name"] for r in sizes] == ["depth-6", "width-128", "rank-2"] and all(len(r["times"]) == 7 for r in sizes)
    assert group["sent"] == 4 * 2 * group["rank"] * group["width"] * group["depth"]
