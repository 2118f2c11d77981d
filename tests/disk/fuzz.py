"""Adapters that a disk, a download or a hand has damaged, thousands of them: refused in a line, or the same model.

    python tests/disk/fuzz.py --damages 5000

Each damage follows from its number alone, so that one that is found can be had again: `--first N --damages 1`. A damaged
folder is inspected by the command and loaded by PEFT or transformers. Four things may come of it: it is refused, its logits are
those of the whole adapter, or there is a fault: other logits ("silent"), an error that is no sentence ("traceback"), or
nothing for ten seconds ("hang").
"""

import argparse
import contextlib
import copy
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from tiny import adapted, batch, build

from lor2c.cli.main import main
from lor2c.tuners.config import ResLoRAConfig

SECONDS = 10  # of one damaged adapter
REFUSALS = (ValueError, OSError, SafetensorError)


def adapters(folder: Path) -> dict[str, Path]:
    """Adapters of each structure, of one base, none of whose numbers is zero."""
    reslora = ResLoRAConfig(r=2, shortcut="middle", pre_num=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    models = {
        "each layer": adapted("BERT", spans=None),
        "moved": adapted("BERT", spans=[[0, 0], [1, 2]], injected={3: [1, 4]}),
        "shared": adapted("BERT", share=True),
        "reslora": get_peft_model(build("BERT"), reslora),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


# Damages to bytes, to tensors, and to the configuration


def in_bytes(folder: Path, rng: random.Random) -> str:
    """A bit, a byte, a block or the end of a file; headers and small files are hit more often than their size says."""
    file = folder / rng.choice(["adapter_model.safetensors"] * 3 + ["adapter_config.json"])
    content = bytearray(file.read_bytes())
    at = rng.randrange(min(len(content), rng.choice([8, 300, 4000, len(content)])))
    many = rng.choice([1, 1, 4, 64, 512])
    match kind := rng.choice(["bit", "bit", "bit", "byte", "zeros", "noise", "cut", "longer", "moved", "twice"]):
        case "bit":
            content[at] ^= 1 << rng.randrange(8)
        case "byte":
            content[at] = rng.randrange(256)
        case "zeros":
            content[at : at + many] = bytes(len(content[at : at + many]))
        case "noise":
            content[at : at + many] = rng.randbytes(len(content[at : at + many]))
        case "cut":
            del content[at:]
        case "longer":
            content += rng.randbytes(many)
        case "moved":
            del content[at : at + many]
        case "twice":
            content[at:at] = content[at : at + many]
    file.write_bytes(content)
    return f"{kind} of {many} at {at} of {file.name}"


def in_tensors(folder: Path, rng: random.Random) -> str:
    """A file that is whole, with tensors that are not; under the old seal, or without one."""
    file = folder / "adapter_model.safetensors"
    tensors = load(file.read_bytes())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    # without a seal, the structure alone is told again by the configuration
    sealed = rng.random() < 0.5 or "reslora" in folder.name
    lor2c = [name for name in tensors if "lor2c_" in name] or list(tensors)
    name = rng.choice(list(tensors) if sealed else lor2c)
    tensor = tensors[name]
    kinds = ["gone", "renamed", "no prefix", "cut", "another type", "layer gone", "span", "more"] + [
        "values",
        "swapped",
    ] * sealed
    match kind := rng.choice(kinds):
        case "gone":
            del tensors[name]
        case "renamed":
            at = rng.randrange(len(name))
            tensors[name[:at] + rng.choice("abcxyz019._") + name[at + rng.randrange(2) :]] = tensors.pop(name)
        case "no prefix":
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)
        case "cut":
            tensors[name] = tensor[..., :-1].contiguous()
        case "another type":
            tensors[name] = tensor.to(rng.choice([torch.float64, torch.int64, torch.float32]))
        case "layer gone":
            part = name.partition(".layer.")[2].partition(".")[0] or "0"
            tensors = {other: t for other, t in tensors.items() if f".layer.{part}." not in other}
        case "span":
            numbers = tensors[rng.choice([n for n in tensors if n.endswith(("_span", "_injected"))] or [name])].view(-1)
            numbers[rng.randrange(len(numbers))] += rng.choice([1, -1, 2, 2**33, -(2**40)])
        case "more":
            tensors[name.replace(".layer.", ".layer.1")] = tensor.clone()
        case "values":
            tensors[name] = tensor * 2 + 1
        case "swapped":
            other = rng.choice([n for n in tensors if tensors[n].shape == tensor.shape])
            tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata if sealed else {"format": "pt"}
    )
    return f"{kind}, {name}, {'sealed' if sealed else 'not sealed'}"


ODD = [None, True, False, 0, -1, 1, 2, 3, 5, 0.5, 1e308, -1e308, 10**30, float("nan"), float("inf")]
ODD += ["", "x", "1", "LORA", "LOR2C"]
ODD += [[], [[]], [[0, 0]], [[0, 3]], [[3, 0]], ["query"], {}, {"0": [1, 1]}, {"a": 1}, [None], "\ud800", "a" * 5000]


def in_settings(folder: Path, rng: random.Random) -> str:
    """A setting that is another, of another type, gone, or one that nobody knows."""
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    name = rng.choice(list(settings))
    match kind := rng.choice(["value", "value", "value", "gone", "renamed", "deep", "no object"]):
        case "value":
            settings[name] = rng.choice(ODD)
        case "gone":
            del settings[name]
        case "renamed":
            settings[name + "s"] = settings.pop(name)
    text = json.dumps(settings)
    if kind == "deep":
        text = text[:-1] + f', "deep": {"[" * 100_000}{"]" * 100_000}}}'
    if kind == "no object":
        text = json.dumps(rng.choice(ODD))
    file.write_text(text)
    return f"{kind} of {name}: {str(settings.get(name))[:40]!r}"


# Doors


class Hang(BaseException):
    pass


def inspected(folder: Path) -> str:
    try:
        main(["inspect", str(folder)])
    except SystemExit as end:
        return "refused" if end.code == 2 else f"traceback: exit code {end.code}"
    return "read"


def loaded(folder: Path, base, door: str) -> torch.Tensor:
    base = copy.deepcopy(base)
    if door == "PEFT":
        model = PeftModel.from_pretrained(base, folder)
    else:
        base.load_adapter(str(folder))
        model = base
    with torch.no_grad():
        return model.eval()(**batch("BERT")).logits


def outcome(folder: Path, base, wanted: torch.Tensor, door: str) -> str:
    """What comes of a damaged folder: "refused", "same", or a fault."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Hang()))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            if (seen := inspected(folder)).startswith("traceback") or said.getvalue().count("\n") > 1:
                return f"traceback: inspect said {said.getvalue()[:200]!r}"
            logits = loaded(folder, base, door)
        return "same" if torch.equal(logits, wanted) else f"silent: {seen} by inspect, other logits through {door}"
    except REFUSALS:
        return "refused"
    except RuntimeError as error:  # torch's own word on a shape
        return "refused" if "size mismatch" in str(error) else f"traceback: {door}, {str(error)[:200]}"
    except Hang:
        return f"hang: {door}"
    except Exception as error:  # noqa: BLE001, each is a find
        return f"traceback: {door}, {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(first: int = 0, damages: int = 5000, seconds: float = float("inf")) -> tuple[Counter[str], dict[int, str]]:
    """How often each outcome came, and the faults by the number of their damage."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    faults: dict[int, str] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, base = adapters(Path(place) / "whole"), build("BERT")
        wanted = {
            (name, door): loaded(folder, base, door)
            for name, folder in whole.items()
            for door in ("PEFT", "transformers")
        }
        for number in range(first, first + damages):
            if time.monotonic() > end:
                break
            rng = random.Random(number)
            name, folder = rng.choice(list(whole)), Path(place) / "damaged"
            folder = folder.with_name(f"damaged {name}")
            shutil.copytree(whole[name], folder)
            what = rng.choice([in_bytes, in_bytes, in_tensors, in_settings])(folder, rng)
            door = "PEFT" if "not sealed" in what else rng.choice(["PEFT", "transformers"])
            came = outcome(folder, base, wanted[name, door], door)
            counts[came.partition(":")[0]] += 1
            if came not in ("refused", "same"):
                faults[number] = f"{name}: {what}: {came}"
            shutil.rmtree(folder)
    return counts, faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="number of the first damage (%(default)s)")
    parser.add_argument("--damages", type=int, default=5000, help="how many (%(default)s)")
    args = parser.parse_args()
    counts, faults = fuzz(args.first, args.damages)
    for number, fault in faults.items():
        print(number, fault)
    print(dict(counts))
    sys.exit(bool(faults))
