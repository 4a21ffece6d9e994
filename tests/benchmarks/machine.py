"""Where a benchmark computes: options that several scripts share."""

from __future__ import annotations

import argparse


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
