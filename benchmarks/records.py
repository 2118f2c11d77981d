"""Records of experiments as results/ keeps them: JSON Lines, each record with its name.

    python benchmarks/records.py runs/whole results/whole.jsonl

Gathers the record.json of every run below a folder, as `lor2c compare` leaves them. A run's name is the path of its folder
with hyphens, the seed without its word: rte/lora/seed-1 is rte-lora-1.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lor2c.disk.files import read_jsonl


def keep(path: Path, name: str, record: dict[str, Any]) -> None:
    """Put a record into a file, in one step: in the place of the one of that name, or at the end."""
    records = {row["name"]: row for row in (read_jsonl(path) if path.exists() else [])}
    records[name] = {"name": name, **record}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in records.values()), encoding="utf-8")
    os.replace(part, path)


def gather(folder: Path, path: Path) -> None:
    """Keep the record of every run below a folder."""
    for file in sorted(folder.rglob("record.json")):
        name = "-".join(file.parent.relative_to(folder).parts).replace("seed-", "")
        keep(path, name, json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with runs")
    parser.add_argument("file", type=Path, help="that keeps their records")
    asked = parser.parse_args()
    gather(asked.folder, asked.file)
