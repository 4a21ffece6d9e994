"""The command line: `locogen run`, `locogen report`, `locogen models`, `locogen concepts`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from locogen import __version__
from locogen.console import show_any_text
from locogen.errors import LocogenError

_ENGINES = """\
engines:
  serial     one run after the other
  processes  several at once on this machine: one a GPU where runs ask for cuda, else as cores and memory allow
  dask       Dask's workers (pip install 'locogen[dask]'): of this machine, one a GPU where runs ask for cuda, which
             sees no other; or with --scheduler of many machines that share the study's folder at the same path

many machines, by hand:
  dask scheduler                                                             # on one
  CUDA_VISIBLE_DEVICES=0 dask worker tcp://HOST:8786 --nthreads 1            # on each, once for every GPU
  locogen run STUDY.toml --scheduler tcp://HOST:8786

on Slurm (pip install dask-jobqueue): in Python, kept running beside the study,
  from dask_jobqueue import SLURMCluster
  cluster = SLURMCluster(cores=1, processes=1, memory="16GB", walltime="04:00:00", job_extra_directives=["--gpus=1"])
  cluster.scale(jobs=8)
  print(cluster.scheduler_address)                                           # give this to --scheduler

A scheduler runs whatever reaches its port: keep it inside a network that you trust.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 when runs failed, 2 for a mistake, 130 after Ctrl-C."""
    show_any_text()
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.command(chosen)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `locogen models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LocogenError, OSError) as error:
        print(f"locogen: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locogen",
        description="Find, show and edit where text-to-image models keep what they know.",
    )
    parser.add_argument("--version", action="version", version=f"locogen {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a study: notebooks for many concepts and models",
        epilog=_ENGINES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("study", type=Path, metavar="STUDY.toml")
    run.add_argument("--force", action="store_true", help="run what is finished again")
    run.add_argument(
        "--only", action="append", metavar="SLUG", help="only this run (may be given several times)"
    )
    run.add_argument(
        "--dry-run", action="store_true", help="check everything and print the plan, start nothing"
    )
    run.add_argument("--retry", choices=["failed"], help="run again what failed before")
    run.add_argument(
        "--keep-going",
        action="store_true",
        help="after a failure too; else what has begun is finished",
    )
    run.add_argument(
        "--engine", choices=["serial", "processes", "dask"], help="see below; default: processes"
    )
    run.add_argument(
        "--workers", type=int, metavar="N", help="runs at once; default: as many as fit the machine"
    )
    run.add_argument(
        "--scheduler", metavar="tcp://HOST:PORT", help="a Dask scheduler; its workers do the runs"
    )
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="make the pages of a study's results")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument(
        "--open", action="store_true", help="show them in a browser, where there is a display"
    )
    report.set_defaults(command=_report)

    models = commands.add_parser("models", help="list the models that locogen knows by name")
    models.set_defaults(command=_models)

    concepts = commands.add_parser("concepts", help="list the concepts that locogen knows by id")
    concepts.add_argument("model", nargs="?", metavar="MODEL", help="only those of this model")
    concepts.add_argument(
        "--file", type=Path, metavar="OWN.toml", help="and those of a file of your own"
    )
    concepts.set_defaults(command=_concepts)
    return parser


def _run(chosen: argparse.Namespace) -> int:
    from locogen.studies.study import StudyFailed, run_study

    try:
        run_study(
            chosen.study,
            only=chosen.only,
            force=chosen.force,
            retry_failed=chosen.retry == "failed",
            keep_going=chosen.keep_going,
            dry_run=chosen.dry_run,
            engine=chosen.engine or ("dask" if chosen.scheduler else "processes"),
            workers=chosen.workers,
            scheduler=chosen.scheduler,
        )
    except StudyFailed as error:
        print(f"locogen: {error}", file=sys.stderr)
        return 1
    return 0


def _report(chosen: argparse.Namespace) -> int:
    from locogen.pages.build import build

    page = build(chosen.folder).resolve()
    print(page.as_uri())
    if chosen.open and has_display():
        import webbrowser

        webbrowser.open(page.as_uri())
    return 0


def has_display() -> bool:
    """Whether a browser would have a screen to show itself on: not over ssh, not in a container."""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _models(chosen: argparse.Namespace) -> int:
    from locogen.catalog import model_table

    columns = ["name", "supported", "family", "size", "layers", "license", "id"]
    _show([columns, *model_table()[columns].to_numpy().tolist()])
    return 0


def _concepts(chosen: argparse.Namespace) -> int:
    from locogen.catalog import concepts

    table = concepts(chosen.model, file=chosen.file)
    _show([list(table.columns), *table.to_numpy().tolist()])
    return 0


def _show(rows: Sequence[Sequence[object]]) -> None:
    """Print rows as columns of text, the first row being their names."""
    told = [
        ["yes" if cell is True else "no" if cell is False else str(cell) for cell in row]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*told, strict=True)]
    for row in told:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    sys.exit(main())
