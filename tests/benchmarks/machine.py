"""Where a benchmark computes, and what it keeps: shared by several scripts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_machine(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--batch-size` and `--threads`."""
    parser.add_argument("--device", default="cpu", help="where the model computes, as for `load`")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="pictures at once: some hundreds suit a GPU"
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")


def set_threads(options: argparse.Namespace) -> None:
    """Take as many threads of the processor as were asked for."""
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)


def kept(folder: Path, name: str, measure: Callable[[], Any]) -> Any:
    """What was measured, from its file in a folder, or measured now and written there.

    A benchmark that is stopped loses one concept at most; processes with other concepts, on other
    machines too, may add their files.
    """
    path = folder / f"{name.replace('/', '-')}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        measured = json.dumps(measure(), indent=1, default=str)
        partial = path.with_suffix(".part")
        partial.write_text(measured, encoding="utf-8")
        partial.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))
