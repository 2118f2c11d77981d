"""Everything worth knowing from a few minutes on a GPU, in sections that you choose.

    python benchmarks/gpu.py --sections contract,step --seconds 240
    python benchmarks/gpu.py --sections glue --glue-dir DIR --model minilm --seconds 300
    python benchmarks/gpu.py --sections alpaca --alpaca-dir DIR --model gemma-270m --seconds 600
    python benchmarks/gpu.py --device cpu --size tiny        # a rehearsal, in a minute

contract  what must hold on a device: bf16, checkpointing, compile, generate, DDP, resume to the bit, quantised bases
step      a training step and a move at the shapes of LLaMA-2-7B and RoBERTa-large, with random weights
glue      `lor2c compare` on whole GLUE training sets, three seeds
alpaca    `lor2c compare` on instructions

Each section is a process of its own with a limit in seconds, so that one that fails or hangs costs you no other. Records
are written one by one, to OUTPUT/CARD-SECTION.jsonl: what was measured before the limit is kept.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
SECTIONS = ("contract", "step", "glue", "alpaca")
Record = dict[str, object]


def card(device: str) -> str:
    "The name of the GPU, as a file's name."
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"\W+", "-", name).strip("-").lower()


# Contract


def llama(device: str, dtype, **sizes: int):
    "A Llama with random weights."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4) | sizes
    torch.manual_seed(0)
    with torch.device(device):
        held = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(LlamaConfig(num_key_value_heads=shape["num_attention_heads"], **shape))
        finally:
            torch.set_default_dtype(held)


def adapted(device: str, dtype, **config):
    "A tiny Llama with residuals that do something, and rows for it."
    import torch
    from peft import get_peft_model

    from lor2c import LoR2CConfig

    model = get_peft_model(llama(device, dtype), LoR2CConfig(**(dict(r=4, alpha=8, dropout=0.0) | config)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lor2c_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    ids = torch.randint(256, (4, 16), generator=generator).to(device)
    return model, dict(input_ids=ids, labels=ids)


def trained(device: str, steps: range, folder: Path | None = None, keep_in: Path | None = None) -> list:
    "Adapter, moments and history after these steps of a run with a merge and an injection, gone on with from a folder."
    import torch
    from peft import PeftModel

    from lor2c import IMCallback

    model, batch = adapted(device, torch.float32, units="stream")
    changes = IMCallback(max_merges=1, max_injections=1, schedule="fractional")
    if folder:
        model = PeftModel.from_pretrained(model.unload(), folder, is_trainable=True)
        changes.history = json.loads((folder / "history.json").read_text())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if folder:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location=device))
        # an injection draws its first values
        drawn = torch.load(folder / "random.pt", weights_only=True)
        torch.set_rng_state(drawn[0]), torch.cuda.set_rng_state_all(drawn[1:])
    changes.begin(model, 16, 4, optimizer, step=steps.start)
    for _ in steps:
        model(**batch).loss.backward()
        changes.before_step(model)
        optimizer.step()
        optimizer.zero_grad()
        changes.after_step(model, optimizer)
    if keep_in:
        model.save_pretrained(keep_in)
        (keep_in / "history.json").write_text(json.dumps(changes.history))
        torch.save(optimizer.state_dict(), keep_in / "optimizer.pt")
        torch.save([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], keep_in / "random.pt")
    return [p.detach() for p in model.parameters() if p.requires_grad] + [str(model.base_model.layout())]


def bf16(device: str) -> str:
    "Loss and gradients are finite, and the adapter switched off is the base."
    import torch

    model, batch = adapted(device, torch.bfloat16, units="stream")
    loss = model(**batch).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, llama(device, torch.bfloat16)(**batch).logits)
    return f"loss {loss.item():.3f}"


def checkpointing(device: str) -> str:
    "Activation checkpointing gives the same gradients."
    import torch

    found = []
    for on in (False, True):
        model, batch = adapted(device, torch.float32)
        if on:
            model.gradient_checkpointing_enable()
        model.train()(**batch).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    far = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
    assert far < 1e-5, far
    return f"largest difference {far:.1e}"


def compiled(device: str) -> str:
    "A compiled model gives the same loss, before and after a merge."
    import torch

    from lor2c import merge_modules

    model, batch = adapted(device, torch.float32)
    fast, losses = torch.compile(model), []
    for merge in (False, True):
        if merge:
            merge_modules(model, 0, 1)
        losses.append((model(**batch).loss.item(), fast(**batch).loss.item()))
    far = max(abs(a - b) for a, b in losses)
    assert far < 1e-4, losses
    return f"largest difference {far:.1e}"


def generation(device: str) -> str:
    "Tokens with a cache are those without, in float32."
    import torch

    model, batch = adapted(device, torch.float32)
    how = dict(input_ids=batch["input_ids"][:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    cached, plain = (model.generate(**how, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)
    return f"{cached.shape[1] - 4} tokens"


def distributed(device: str) -> str:
    "DistributedDataParallel in one process, NCCL on a GPU: a merge, and training goes on."
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from lor2c import merge_modules

    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, batch = adapted(device, torch.float32)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(6):
            loss = wrapped(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step == 2:
                merge_modules(wrapped, 0, 1, optimizer=optimizer)
        assert losses[-1] < losses[3], losses
    finally:
        torch.distributed.destroy_process_group()
    return f"{backend}, loss {losses[0]:.3f} to {losses[-1]:.3f}"


def resumed(device: str) -> str:
    "A run that was stopped between its moves ends as the undisturbed one, to the bit, with deterministic kernels."
    import torch

    torch.use_deterministic_algorithms(True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            whole = trained(device, range(16))
            trained(device, range(2), keep_in=Path(folder))
            again = trained(device, range(2, 16), folder=Path(folder))
    finally:
        torch.use_deterministic_algorithms(False)
    assert whole[-1] == again[-1] and all(torch.equal(a, b) for a, b in zip(whole[:-1], again[:-1], strict=True))
    return whole[-1]


def shrunk(device: str) -> str:
    "Half of the numbers go, and the loss stays finite."
    import torch

    from lor2c import shrink

    model, batch = adapted(device, torch.float32, units="stream")
    before = model(**batch).loss.item()
    change = shrink(model, [batch], budget=0.5)
    return f"loss {before:.3f} to {model(**batch).loss.item():.3f}, {change.parameters[1]} of {change.parameters[0]}"


def quantised(how: str) -> Callable[[str], str]:
    "A check that a quantised base trains its residuals."

    def check(device: str) -> str:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        from lor2c import LoR2CConfig
        from lor2c.data.base import _quantization

        with tempfile.TemporaryDirectory() as folder:
            llama("cpu", torch.bfloat16).save_pretrained(folder)
            base = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=_quantization(how, torch.bfloat16), device_map={"": device}, dtype=torch.bfloat16
            )
        model = get_peft_model(base, LoR2CConfig(r=4, alpha=8))
        ids = torch.arange(32, device=device).reshape(2, 16)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
        return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"

    return check


CHECKS: dict[str, tuple[Callable[[str], str], str | None]] = {  # name: the check, and the package that it needs
    "bf16": (bf16, None),
    "activation checkpointing": (checkpointing, None),
    "generate with a cache": (generation, None),
    "one process of several": (distributed, None),
    "resume to the bit": (resumed, None),
    "shrink": (shrunk, None),
    "compile": (compiled, None),
    "8bit": (quantised("8bit"), "bitsandbytes"),
    "4bit": (quantised("4bit"), "bitsandbytes"),
    "torchao int8": (quantised("torchao-int8"), "torchao"),
}


def contract(args: argparse.Namespace) -> Iterator[Record]:
    "What holds on this device, a record for each check."
    slow = ("compile", "8bit", "4bit", "torchao int8")
    for name, (check, needs) in CHECKS.items():
        if needs and find_spec(needs) is None or args.size == "tiny" and name in slow:
            yield {"name": name, "passed": None, "found": f"needs {needs}" if needs else "left out at this size"}
            continue
        start = time.perf_counter()
        try:
            passed, found = True, check(args.device)
        except Exception as error:  # noqa: BLE001, the record of what failed is the result
            passed, found = False, f"{type(error).__name__}: {error}"[:500]
        yield {"name": name, "passed": passed, "found": found, "seconds": round(time.perf_counter() - start, 2)}


# A step, and a move

SHAPES = {
    "llama-2-7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4),
}


def methods(layers: int, r: int) -> dict[str, object]:
    "PEFT's configuration of each contender; None for the floor, which has no adapter."
    from peft import LoraConfig

    from lor2c import LoR2CConfig, ResLoRAConfig

    half = list(range(layers // 2, layers))
    lora, ours = dict(r=r, lora_alpha=r // 2, lora_dropout=0.0), dict(r=r, alpha=r // 2, dropout=0.0)
    return {
        "lora": LoraConfig(**lora, target_modules=["q_proj", "v_proj"]),
        "lora, upper half": LoraConfig(**lora, target_modules=["q_proj", "v_proj"], layers_to_transform=half),
        "lora, all projections": LoraConfig(**lora, target_modules="all-linear"),
        "lor2c": LoR2CConfig(**ours),
        "lor2c, in stream units": LoR2CConfig(**ours, units="stream"),
        "lor2c, upper half": LoR2CConfig(**ours, spans=[[t, t] for t in half]),
        "imlor2c, after its moves": LoR2CConfig(**ours),
        "reslora": ResLoRAConfig(**ours, shortcut="block", pre_num=1),
        "rm-lora": LoraConfig(**lora, target_modules=["q_proj", "v_proj"]),
        "floor: frozen, backward to the first layer": None,
    }


def step(args: argparse.Namespace) -> Iterator[Record]:
    "A training step of each method on one frozen base, in turn; ratios to LoRA's within this process."
    import torch
    from peft import get_peft_model

    shape = SHAPES["tiny" if args.size == "tiny" else "llama-2-7b"]
    batch, length, rounds, r = (2, 16, 2, 4) if args.size == "tiny" else (4, 512, 8, 64)
    base = llama(args.device, torch.bfloat16, **shape).requires_grad_(False)
    base.config.use_cache = False
    rows = torch.randint(shape["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0)).to(args.device)
    first: dict[str, float] = {}
    for name, config in methods(shape["num_hidden_layers"], r).items():
        model = get_peft_model(base, config) if config else base
        moves = moved(model, shape["num_hidden_layers"], args.device) if name.startswith("imlor2c") else {}
        try:
            found = measured(model, name, rows, rounds, args.device)
        except torch.OutOfMemoryError as error:
            found = {"failed": str(error)[:200]}
        if config:
            model.unload()
        first = first or found
        ratios = {f"{k}_of_lora": round(v / first[k], 3) for k, v in found.items() if k in first and first[k]}
        yield {"name": name, "shape": shape, "batch": batch, "length": length, "rank": r, **found, **ratios, **moves}


def measured(model, name: str, rows, rounds: int, device: str) -> dict[str, float]:
    "Median seconds of a step, tokens a second, trained numbers, and the peak of memory above the base's."
    import torch

    from lor2c import RMLoRACallback

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    if name == "rm-lora":
        RMLoRACallback().begin(model, optimizer)
    embeds = None if trained else model.get_input_embeddings()(rows).detach().requires_grad_()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        loss = model(inputs_embeds=embeds, labels=rows).loss if embeds is not None else model(input_ids=rows, labels=rows).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    peak = torch.cuda.max_memory_allocated() - held if device == "cuda" else 0
    found = dict(seconds=seconds, tokens_per_second=rows.numel() / seconds, trained=sum(p.numel() for p in trained))
    return found | dict(peak_mib=round(peak / 2**20, 1))


def moved(model, layers: int, device: str) -> dict[str, float]:
    "As many merges and injections as the paper's Table II has, a quarter of the layers each, and the seconds of one."
    import torch

    from lor2c import inject_lora, merge_modules

    times: dict[str, list[float]] = {"merge_seconds": [], "injection_seconds": []}
    for i in range(layers // 4):
        for name, move in (("merge_seconds", lambda i=i: merge_modules(model, 2 * i, 2 * i + 1)),
                           ("injection_seconds", lambda i=i: inject_lora(model, layers - 1 - i))):  # fmt: skip
            start = time.perf_counter()
            move()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


# Walkthroughs


def compared(args: argparse.Namespace, tasks: str, data: str, methods: str, *more: str) -> Iterator[Record]:
    "The records of `lor2c compare`, as far as it gets; its folder is kept, so the same command goes on."
    folder = args.output / f"{card(args.device)}-{tasks.replace(',', '-')}"
    command = [sys.executable, "-m", "lor2c", "compare", "--tasks", tasks, "--methods", methods, "--model", args.model]
    command += ["--device", args.device, "--data-dir", data, "--output-dir", str(folder), "--jobs", "1", *more]
    try:
        subprocess.run(command, check=True, timeout=args.seconds - 10)
    except subprocess.TimeoutExpired:
        print("the limit is reached: the same command goes on", flush=True)
    for file in sorted(folder.rglob("record.json")):
        yield {"name": "-".join(file.parent.relative_to(folder).parts).replace("seed-", ""), **json.loads(file.read_text())}


def glue(args: argparse.Namespace) -> Iterator[Record]:
    "Whole training sets, three seeds; on a CPU's rehearsal one epoch over a few rows."
    small = ("--max-train-samples", "32", "--epochs", "1", "--seeds", "1") if args.size == "tiny" else ("--seeds", "1-3")
    tasks = "sst2" if args.size == "tiny" else "stsb,mrpc,cola,rte"
    methods = "lor2c,lora" if args.size == "tiny" else "lor2c,lora,lora:rank=4,imlor2c,reslora-bs,rmlora"
    return compared(args, tasks, args.glue_dir, methods, "--max-length", "128", *small)


def alpaca(args: argparse.Namespace) -> Iterator[Record]:
    "Instructions: the published form, stream units, and LoRA where it writes and on q and v, at about the same numbers."
    methods = (
        "lor2c:rank=16:alpha=32:units=stream:lr=1e-3,lora:rank=5:alpha=10:targets=writing:lr=1e-3,"
        "lora:rank=8:alpha=16:lr=1e-3,lor2c:rank=16:alpha=32:units=paper:lr=3e-5"
    )
    tiny = ("--max-train-samples", "8", "--held-out", "8", "--batch-size", "4", "--max-length", "64")
    full = ("--max-train-samples", "12800", "--held-out", "512", "--batch-size", "16", "--max-length", "256")
    size = tiny if args.size == "tiny" else full
    return compared(args, "alpaca", args.alpaca_dir, methods, "--epochs", "1", "--seeds", "1", "--dropout", "0", *size)


def run_section(args: argparse.Namespace) -> None:
    "Write a section's records as they come."
    import torch
    import transformers

    import lor2c

    transformers.logging.set_verbosity_error()
    common = {"device": card(args.device), **{library.__name__: library.__version__ for library in (torch, transformers, lor2c)}}
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / f"{card(args.device)}-{args.section}.jsonl").open("a") as file:
        for record in globals()[args.section](args):
            print({k: v for k, v in record.items() if isinstance(v, str | int | float | None)}, flush=True)
            file.write(json.dumps({**record, **common}) + "\n")
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="contract,step", help=f"some of {', '.join(SECTIONS)} (%(default)s)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--seconds", type=float, default=240, help="limit of each section (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/gpu"))
    parser.add_argument("--model", default="minilm", help="of glue and alpaca (%(default)s)")
    parser.add_argument("--glue-dir"), parser.add_argument("--alpaca-dir")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        return run_section(args)
    asked = args.sections.split(",")
    if wrong := [name for name in asked if name not in SECTIONS]:
        parser.error(f"no section {wrong[0]!r}: choose some of {', '.join(SECTIONS)}")
    for name, folder in (("glue", args.glue_dir), ("alpaca", args.alpaca_dir)):
        if name in asked and not folder:
            parser.error(f"section {name} needs --{name}-dir: a folder with its rows")
    failed = []
    for name in asked:
        print(f"## {name}", flush=True)
        try:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--section", name], timeout=args.seconds).returncode
        except subprocess.TimeoutExpired:
            done = 124
        failed += [name] * bool(done)
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
