"""Draw the pictures of the home page, from the records under results/, and of the methods; with `--check`, only say whether they are up to date."""

# ruff: noqa: E501  a tag stays in one piece

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "nbs/images"
# A colour for each residual, and one for the text on it.
HUES = (
    ("#0072B2", "#fff"),
    ("#E69F00", "#000"),
    ("#009E73", "#000"),
    ("#56B4E9", "#000"),
    ("#CC79A7", "#000"),
    ("#D55E00", "#000"),
)
# A panel of its own under each picture: whoever chooses a scheme that their system does not prefer can still read it.
STYLE = """text{font:20px system-ui,sans-serif;fill:#222}.panel{fill:#fff;stroke:#d0d7de}.soft{fill:#57606a}.line{stroke:#57606a;stroke-width:2;fill:none}
.box{fill:#eef2f6;stroke:#8297ab}.code{font-family:ui-monospace,monospace}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.panel{fill:#161b22;stroke:#30363d}.soft{fill:#9da7b3}.line{stroke:#9da7b3}.box{fill:#21262d;stroke:#57606a}}"""


def record(experiment: str, name: str) -> dict:
    """A record of an experiment under results/."""
    lines = (ROOT / f"results/{experiment}.jsonl").read_text("utf-8").splitlines()
    return next(one for one in map(json.loads, lines) if one["name"] == name)


def svg(width: int, height: int, says: str, style: str, *parts: str) -> str:
    """A picture on its panel."""
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{says}">'
    panel = f'<rect class="panel" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="12"/>'
    return "\n".join([start, f"<style>{STYLE}\n{style}</style>", panel, *parts, "</svg>"]) + "\n"


# The structure that changes

LEFT, WIDE, GAP = 34, 98, 20  # of the boxes that stand for layers
SECONDS, HOLD, EPOCH = 12, 1.0, 1.1  # of the animation, before its first epoch, and of an epoch


def percent(epoch: float) -> float:
    return round(100 * (HOLD + EPOCH * epoch) / SECONDS, 1)


def left(layer: int) -> int:
    return LEFT + layer * (WIDE + GAP)


def residual(first: int, last: int, hue: int, look: str) -> str:
    """An arc from the stream before its first layer to the stream behind its last, and the pair on it."""
    fill, ink = HUES[hue]
    a, b = left(first) - 6, left(last) + WIDE + 6
    middle = (a + b) // 2
    arc = f'<path d="M{a} 178V100q0-14 14-14H{b - 14}q14 0 14 14V166" fill="none" stroke="{fill}" stroke-width="4"/>'
    head = f'<path d="M{b - 7} 165h14l-7 12z" fill="{fill}"/><rect x="{middle - 27}" y="69" width="54" height="34" rx="7" fill="{fill}"/>'
    label = f'<text x="{middle}" y="93" text-anchor="middle" style="fill:{ink}">BA</text>'
    return f'<g class="{look}">{arc}{head}{label}</g>'


def lora(layer: int, hue: int, look: str) -> str:
    """The pairs inside a layer, on its queries and values."""
    fill, ink = HUES[hue]
    pairs = [(left(layer) + dx, name) for dx, name in ((12, "q"), (53, "v"))]
    return f'<g class="{look}">' + "".join(
        f'<rect x="{x}" y="172" width="34" height="26" rx="6" fill="{fill}"/>'
        f'<text x="{x + 17}" y="191" text-anchor="middle" style="fill:{ink}">{name}</text>' for x, name in pairs
    ) + "</g>"  # fmt: skip


def keyframes(name: str, at: float, come: bool, shift: int = 0) -> str:
    """Something that comes or goes at a moment, by `shift` to the side."""
    before, after = ("0", "1") if come else ("1", "0")
    moved = f";transform:translateX({shift}px)" if shift else ""
    still = ";transform:none" if shift else ""
    frames = f"0%,{at:.1f}%{{opacity:{before}{still}}}{at + 3:.1f}%,100%{{opacity:{after}{moved}}}"
    return f"@keyframes {name}{{{frames}}}.{name}{{animation-name:{name}}}"


def structure(run: dict) -> str:
    """The recorded run: six residuals, the merges and injections as they came, and the loss below."""
    arcs, parts, frames = {(i, i): (i, "") for i in range(6)}, [], []
    layouts = [(0.0, "[0] [1] [2] [3] [4] [5]")]
    for entry in run["structure"]:
        if not (move := entry["move"]) or move["what"] != "done":
            continue
        n, (a, b), late = len(frames), move["layers"], 0.35 * (move["kind"] == "inject")
        at = percent(entry["epoch"] + late)
        gone = [span for span in arcs if a <= span[0] and span[1] <= b]
        hue = arcs[gone[-1 if str(move["kept"]).startswith("second") else 0]][0]
        for i, span in enumerate(gone):
            shift = (58 if i == 0 else -58) if len(gone) == 2 else 0
            frames.append(keyframes(f"g{n}{i}", at, come=False, shift=shift))
            old, look = arcs.pop(span)
            parts.append(residual(*span, old, f"was {look} g{n}{i}".replace("  ", " ")))
        frames.append(keyframes(f"c{n}", at + 2, come=True))
        if move["kind"] == "merge":
            arcs[a, b] = hue, f"is c{n}"
        else:
            parts.append(lora(a, hue, f"is c{n}"))
        if late:
            spans = " ".join(f"[{x}..{y}]" if x < y else f"[{x}]" for x, y in entry["spans"])
            layouts.append((at, " ".join([spans, *(f"LoRA@{layer}" for layer, *_ in entry["injected"])])))
    parts += [residual(*span, hue, look) for span, (hue, look) in arcs.items()]
    parts += [
        f'<text x="{LEFT - 6}" y="44" class="code {look}">{text}</text>' for text, look in states(layouts, frames)
    ]
    stream, *layers = boxes()
    moving = f".is,.was,.draw{{animation:{SECONDS}s 3 both}}" + "".join(frames)
    draw = f"@keyframes draw{{0%,{percent(1)}%{{stroke-dashoffset:100}}{percent(8)}%,100%{{stroke-dashoffset:0}}}}.draw{{animation-name:draw;animation-timing-function:linear}}"
    style = f".was{{opacity:0}}\n@media(prefers-reduced-motion:no-preference){{{moving}{draw}}}"
    says = (
        "Six layers in a row, and around each a low-rank residual in a colour of its own. While the model trains, the residuals "
        "of layers 4 and 5 become one, and so do those of 1 and 2; those of layers 3 and 0 give way to LoRA on queries and "
        "values. Below, the training loss falls over eight epochs."
    )
    order = [p for p in parts if "BA</text>" in p], [p for p in parts if "BA</text>" not in p]
    return svg(760, 322, says, style, stream, *order[0], *layers, *order[1], *loss(run))


def states(layouts: list[tuple[float, str]], frames: list[str]) -> list[tuple[str, str]]:
    """Each layout in words, with the class that lets it come and go; the last one stays."""
    found = []
    for i, (at, text) in enumerate(layouts):
        end = layouts[i + 1][0] if i + 1 < len(layouts) else None
        steps = f"{at:.1f}%,{(end or 100):.1f}%{{opacity:1}}"
        before = f"0%,{at - 0.1:.1f}%{{opacity:0}}" if i else ""
        after = f"{end + 0.1:.1f}%,100%{{opacity:0}}" if end else ""
        frames.append(f"@keyframes s{i}{{{before}{steps}{after}}}.s{i}{{animation-name:s{i}}}")
        found.append((text, f"{'was' if end else 'is'} s{i}"))
    return found


def loss(run: dict) -> list[str]:
    """The training loss of each epoch, and where the moves came."""
    values = [epoch["train_loss"] for epoch in run["history"]]
    high, low, right = max(values), min(values), left(5) + WIDE
    points = [(right - 420 + 60 * i, 238 + 62 * (high - v) / (high - low)) for i, v in enumerate(values)]
    line = "M" + "L".join(f"{x} {y:.0f}" for x, y in points)
    when = sorted({e["epoch"] for e in run["structure"] if e["move"] and e["move"]["what"] == "done"})
    ticks = "".join(
        f'<path class="line" stroke-dasharray="3 4" d="M{right - 480 + 60 * e:.0f} 228V306"/>' for e in when
    )
    words = f'<text class="soft" x="{right - 350}" y="304">moves</text>'
    words += f'<text class="soft" x="{LEFT - 6}" y="262">training loss</text><text class="soft" x="{LEFT - 6}" y="290">{len(values)} epochs</text>'
    ends = f'<text x="{points[0][0] - 8}" y="{points[0][1] + 6:.0f}" text-anchor="end">{high:.2f}</text><text x="{right}" y="284" text-anchor="end">{low:.2f}</text>'
    return [
        ticks,
        words,
        ends,
        f'<path class="draw" pathLength="100" stroke-dasharray="100" d="{line}" fill="none" stroke="#2780e3" stroke-width="4"/>',
    ]


# One picture for each method that has no other


def boxes() -> list[str]:
    """Six layers in a row, on the stream."""
    return ['<path class="line" d="M12 179H746"/>'] + [
        f'<rect class="box" x="{left(i)}" y="140" width="{WIDE}" height="66" rx="8"/>'
        f'<text x="{left(i) + WIDE // 2}" y="163" text-anchor="middle">layer {i}</text>'
        for i in range(6)
    ]


def shared() -> str:
    """ShareLoR2C: a B for each layer, and one A."""
    arcs = []
    for i in range(6):
        middle = left(i) + WIDE // 2
        arcs += [
            residual(i, i, i, "pair").replace(f'x="{middle}" y="93"', f'x="{middle - 13}" y="93"').replace("BA", "B"),
            f'<rect x="{middle}" y="69" width="27" height="34" rx="7" fill="#8297ab"/>'
            f'<text x="{middle + 13}" y="93" text-anchor="middle" style="fill:#000">A</text>',
        ]
    says = "A residual around each of six layers. Each has a B in a colour of its own, and all have the same A."
    stream, *layers = boxes()
    return svg(
        760,
        224,
        says,
        "",
        f'<text class="soft" x="{LEFT - 6}" y="44">one A, a B for each layer</text>',
        stream,
        *arcs,
        *layers,
    )


def shortcuts() -> str:
    """ResLoRA: a block in each layer that reads the block before it."""
    parts = [lora(i, i, "pair").replace(">q<", ">BA<").replace(">v<", "><") for i in range(6)]
    parts = [p.partition("<rect")[0] + f'<rect x="{left(i) + 24}" y="170" width="50" height="30" rx="6" fill="{HUES[i][0]}"/>'
             f'<text x="{left(i) + 49}" y="192" text-anchor="middle" style="fill:{HUES[i][1]}">BA</text></g>' for i, p in enumerate(parts)]  # fmt: skip
    arcs = [
        f'<path d="M{left(i) + 60} 200C{left(i) + 70} 262 {left(i + 1) + 22} 262 {left(i + 1) + 36} 208" fill="none" stroke="{HUES[i][0]}" stroke-width="4"/>'
        f'<path d="M{left(i + 1) + 29} 212l12 -1-3 -11z" fill="{HUES[i][0]}"/>'
        for i in range(5)
    ]
    says = "A low-rank block inside each of six layers, and an arrow from each block to the next."
    title = f'<text class="soft" x="{LEFT - 6}" y="118">while it trains, each block also reads the one before it</text>'
    return svg(760, 190, says, "", '<g transform="translate(0 -78)">', title, *boxes(), *parts, *arcs, "</g>")


def masked() -> str:
    """RM-LoRA: half of the directions of a pair learn at each step, and not always the same."""
    rows, steps = 8, 12
    cells = [
        f'<rect x="{150 + 48 * step}" y="{62 + 24 * row}" width="42" height="18" rx="4" '
        + (f'fill="{HUES[row % 6][0]}"/>' if (3 * row + 5 * step) % rows < rows // 2 else 'class="box"/>')
        for row in range(rows) for step in range(steps)
    ]  # fmt: skip
    names = [
        f'<text class="soft" x="{LEFT - 6}" y="{77 + 24 * row}" style="font-size:16px">direction {row}</text>'
        for row in range(rows)
    ]
    title = f'<text class="soft" x="{LEFT - 6}" y="40">which directions of a pair learn, step by step</text>'
    says = "A grid of eight directions and twelve steps. In each step four of the eight are coloured: these learn."
    return svg(760, 272, says, "", title, *names, *cells)


# The one number

CONTENDERS = {
    "LoR2C in stream units, r=16": "lor2c-rank-16-alpha-32-units-stream",
    "LoRA, writing projections, r=5": "lora-rank-5-alpha-10-targets-writing",
    "LoR2C in stream units, r=8": "lor2c-rank-8-alpha-16-units-stream",
    "LoRA, queries and values, r=8": "lora-rank-8-alpha-16",
    "LoR2C as published, r=16": "lor2c-rank-16-alpha-32",
}


def falls() -> list[tuple[str, int, float, float]]:
    """Each contender, its numbers, and the held-out loss on Gemma before it and after its best rate."""
    lines = (ROOT / "results/gemma-units.jsonl").read_text("utf-8").splitlines()
    found = []
    for name, start in CONTENDERS.items():
        runs = [r for r in map(json.loads, lines) if r["name"].partition("-lr-")[0] == start]
        best = min(runs, key=lambda r: r["metrics"]["last"]["held_out_loss"])
        before, after = (best["metrics"][when]["held_out_loss"] for when in ("baseline", "last"))
        found.append((name, best["adapter_parameters"], before, after))
    return sorted(found, key=lambda one: one[-1])


def gemma(rows: list[tuple[str, int, float, float]]) -> str:
    """A bar for each contender: how far the loss falls."""
    bars = []
    for i, (name, numbers, before, after) in enumerate(rows):
        y, length = 52 + 44 * i, 700 * (before - after)
        fill = "#D55E00" if "LoR2C" in name else "#8297ab"
        bars.append(
            f'<text x="20" y="{y + 22}">{name}</text><rect x="345" y="{y}" width="{length:.0f}" height="32" rx="4" fill="{fill}"/>'
            f'<text x="357" y="{y + 22}" style="fill:#000">{numbers:,}</text>'
            f'<text x="{345 + length + 10:.0f}" y="{y + 22}">−{before - after:.3f}</text>'
        )
    title = f'<text class="soft" x="20" y="34">How far the held-out loss falls from {rows[0][2]:.2f}, and with how many numbers</text>'
    says = "; ".join(f"{name}: {before - after:.3f} with {numbers:,} numbers" for name, numbers, before, after in rows)
    return svg(760, 52 + 44 * len(rows) + 12, f"How far the held-out loss falls. {says}.", "", title, *bars)


def pictures() -> dict[Path, str]:
    """Every picture and what it should hold."""
    return {
        IMAGES / "structure.svg": structure(record("rules", "mrpc-paper-1")),
        IMAGES / "gemma_loss.svg": gemma(falls()),
        IMAGES / "share.svg": shared(),
        IMAGES / "reslora.svg": shortcuts(),
        IMAGES / "rm_lora.svg": masked(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a picture is not what the records say")
    check = parser.parse_args().check
    for path, text in pictures().items():
        if not check:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            sys.exit(f"{path.name} is not what results/ says: run `make readme`")
