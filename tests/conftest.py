"""What the tests share: where the repository is, copies of it to build in, and which tests are slow."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test depends on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where the tests run in a shell's background, Ctrl-C is ignored, also by what they start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# What nobody commits; the stars are for `.venv-3.12`, `lor2c.egg-info` and the like.
NOT_OURS = shutil.ignore_patterns(
    ".git", ".venv*", "venv", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", ".hypothesis",
    ".ipynb_checkpoints", "_proc", "_docs", "nbdev.yml", "sidebar.yml", "shared",
)  # fmt: skip


def notebooks() -> list[Path]:
    """Every notebook, relative to the repository."""
    skip = {"_proc", ".ipynb_checkpoints"}
    return sorted(p.relative_to(ROOT) for p in ROOT.glob("nbs/**/*.ipynb") if not skip & set(p.parts))


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command of this environment. Returns what it printed, fails the test with it if it fails."""
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = f"{done.stdout}{done.stderr}"
        pytest.fail(f"{' '.join(map(str, command))} exited {done.returncode}:\n{said}", pytrace=False)
    return done.stdout


def copy_repository(to: Path) -> Path:
    """A copy of the repository as it would be committed, links kept as links."""
    return shutil.copytree(ROOT, to, symlinks=True, ignore=NOT_OURS)


def refused(capsys, *arguments: str | Path) -> str:
    """The one line that a wrong input gets, with exit code 2."""
    from lor2c.cli.main import main

    capsys.readouterr()  # what was written before is not the command's
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("lor2c: error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return copy_repository(tmp_path / "lor2c")


@pytest.fixture(scope="session")
def glue_data(tmp_path_factory) -> Path:
    """A GLUE folder with a small sst2 made of real snippets."""
    from lor2c.data.demo import load_demo

    folder = tmp_path_factory.mktemp("glue") / "sst2"
    folder.mkdir()
    demo = load_demo()
    for split, rows in (("train", 128), ("validation", 64)):
        demo[split].select(range(rows)).rename_column("text", "sentence").to_parquet(folder / f"{split}.parquet")
    return folder.parent


@pytest.fixture
def cut_and_resumed(monkeypatch, tmp_path) -> Callable[..., Path]:
    """Interrupts a run, lets it go on, and compares its history and adapter with the folder and record of the whole run."""
    import torch
    from safetensors.torch import load_file

    from lor2c.runs.progress import Progress
    from lor2c.runs.train import train

    def stop(self, args, state, control, **_):
        if state.epoch:
            raise KeyboardInterrupt

    def check(run, whole: Path, record: dict) -> Path:
        folder = tmp_path / "cut"
        with monkeypatch.context() as patch:
            patch.setattr(Progress, "on_epoch_begin", stop)
            with pytest.raises(KeyboardInterrupt):
                train(run, folder)
        cut = train(run, folder, resume=True)
        assert cut["history"] == record["history"] and cut["metrics"] == record["metrics"]
        one, other = (load_file(place / "adapter/adapter_model.safetensors") for place in (whole, folder))
        assert all(torch.equal(one[name], other[name]) for name in one | other)
        return folder

    return check


# Not in `make test` but in `make test-more`, which CI runs as well: every test whose id begins like one of these. Together they
# take longer than all others, and most changes do not touch what they test: the site in a browser, several processes, runs
# that are killed, sweeps, pages that train. A test or notebook that you add is in `make test`, unless you name it or its
# whole file here.
PAGES = (
    *(f"api/cli/{name}" for name in ("03_train", "04_demo", "05_many", "06_inference", "08_main")),
    *(f"api/experiments/{name}" for name in ("00_pool", "03_compare", "04_sweep")),
    *("api/runs/09_train", "api/runs/10_again", "api/training/09_imlor2c", "api/training/12_rm_lora", "api/tuners/12_fold"),
    *(f"explanations/{name}" for name in ("equations", "gradient_flow", "optimizer", "papers_and_code")),
    *(f"explanations/{name}" for name in ("residual_or_lora", "stream_norm", "what_sfs_sees", "why_no_fold")),
    "explanations/annotated_lor2c",
    *(f"howto/{name}" for name in ("accelerate", "choose_structure", "draw", "hub", "own_model", "own_task", "quantised")),
    *(f"howto/{name}" for name in ("command_line", "many_machines", "other_trainers", "resume", "serve", "several_gpus")),
    *(f"howto/{name}" for name in ("trainer", "trl")),
    *(f"methods/{name}" for name in ("lor2c", "sharelor2c", "imlor2c", "rm_lora", "reslora")),
    *(f"methods/{name}" for name in ("stream_units", "fitted_merges", "shrink")),
    *(f"results/{name}" for name in ("comparison", "figures", "method_comparison", "tables")),
    *(f"tutorials/{name}" for name in ("alpaca", "demo", "glue", "imlor2c", "reslora", "rm_lora")),
    *(f"tutorials/{name}" for name in ("pictures", "squad")),
)
MORE = (
    "tests/test_docs.py::test_plain_nbdev_shows_the_reference",
    "tests/test_docs.py::test_quarto_is_new_enough",
    "tests/test_benchmarks.py::test_the",
    "tests/cli/test_main.py::test_a_run_that_cannot_shrink",
    "tests/inference/test_export.py::test_round_trips",
    *(f"tests/inference/test_graphs.py::test_{name}" for name in ("every_engine", "the_command")),
    "tests/runs/test_instructions.py::test_micro_batches_change_nothing",
    "tests/training/test_rm_lora.py::test_killed_and_resumed_is_the_undisturbed_run",
    *(f"tests/test_method_comparison.py::test_{name}" for name in ("an_experiment_is_started", "the_small_table")),
    "tests/test_site.py",
    "tests/training/test_processes.py",
    "tests/training/test_zero.py",
    "tests/training/test_fsdp.py",
    "tests/tuners/test_units.py::test_activation_checkpointing_and_compile",
    "tests/tuners/test_units.py::test_measured_under_compile_and_in_a_trainer",
    "tests/training/test_resume.py",
    "tests/training/test_rm_lora.py::test_two_processes_are_one",
    "tests/cli/test_main.py::test_demo_passes_limits_to_the_methods_that_have_them",
    "tests/cli/test_main.py::test_killed_and_resumed_is_the_undisturbed_run",
    "tests/cli/test_main.py::test_no_network_and_no_cache",
    "tests/cli/test_hostile.py::test_a_disk_that_takes_no_more",
    "tests/cli/test_hostile.py::test_the_others_end_with_a_line_when_a_process_dies",
    "tests/cli/test_hostile.py::test_a_hub_that_does_not_answer_is_given_up_soon",
    "tests/cli/test_command_lines.py::test_many",
    "tests/cli/test_config.py::test_tensorboard_gets_the_structure",
    *(f"tests/disk/test_checkpoints.py::test_a_{name}" for name in ("run", "damaged", "moved")),
    "tests/disk/test_checkpoints.py::test_left_over",
    "tests/data/test_problems.py::test_a_decoder_learns",
    *(f"tests/data/test_images.py::test_{name}" for name in ("other_digits", "the_best_epoch", "only_a_pair")),
    *(f"tests/data/test_drawing.py::test_{name}" for name in ("end_to_end", "interrupted", "parquet")),
    *(f"tests/tuners/test_unet.py::test_{name}" for name in ("life", "checkpointing", "bf16", "folded_by_norms")),
    "tests/disk/test_fuzz.py",
    *(f"tests/runs/test_methods.py::test_comes_back_as_scored[{name}-" for name in ("adapterdrop", "dylora")),
    "tests/inference/test_export.py::test_round_trips_of_every_stack",
    "tests/experiments/test_papers.py::test_rows_are_run",
    "tests/experiments/test_pool.py",
    "tests/experiments/test_sweep.py",
    "tests/runs/test_methods.py",
    "tests/runs/test_instructions.py::test_killed_and_resumed_is_the_undisturbed_run",
    "tests/runs/test_instructions.py::test_out_of_memory_says_what_to_try",
    "tests/runs/test_instructions.py::test_training_survives_a_reader_that_goes_away",
    "tests/runs/test_instructions.py::test_two_processes_share_a_batch",
    "tests/test_project.py::test_a_tutorial_is_taken_along",
    "tests/test_project.py::test_type_checker_is_content",
    "tests/tuners/test_doors.py::test_compiled_through_moves_and_switches",
    "tests/tuners/test_rows.py::test_compiled_code_outlives_swaps_and_switches",
    *(f"tests/test_notebooks.py::test_notebook[{page}]" for page in PAGES),
)


class ByFile(LoadScopeScheduling):
    """A file goes to one worker, for its fixtures are costly; notebooks go one by one."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if "test_notebooks.py" in nodeid else nodeid.partition("::")[0]


# xdist's own loadgroup has no effect under pytest 9.2, which no longer lets a plugin rename its tests.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)  # before pytest reads `-m more`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in `make test-more`. The longest notebooks begin first; slow tests are left out unless asked for."""
    for item in items:
        if item.nodeid.startswith(MORE):
            item.add_marker("more")
    items.sort(key=lambda item: "[tutorials/" not in item.nodeid)
    if not os.environ.get("LOR2C_SLOW"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: runs under `make test-all`"))
