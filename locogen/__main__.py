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
  processes  several runs at once on this machine: one for each GPU if runs use cuda, otherwise
             the number that its cores and memory allow
  dask       Dask workers (pip install 'locogen[dask]'), on this machine one for each GPU if runs
             use cuda; or, with --scheduler, on many machines that share the study's folder at the
             same path

many machines, by hand:
  dask scheduler                                                   # on one of them
  CUDA_VISIBLE_DEVICES=0 dask worker tcp://HOST:8786 --nthreads 1  # on each, once for every GPU
  locogen run STUDY.toml --scheduler tcp://HOST:8786

on Slurm (pip install dask-jobqueue): in Python, in a session that stays open during the study,
  from dask_jobqueue import SLURMCluster
  cluster = SLURMCluster(cores=1, processes=1, memory="16GB", walltime="04:00:00",
                         job_extra_directives=["--gpus=1"])
  cluster.scale(jobs=8)
  print(cluster.scheduler_address)                                 # give this to --scheduler

A scheduler executes whatever is sent to its port: use it only inside a network that you trust.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those of the command line, without the program's name. Left out: of this process.

    Returns:
        The exit code: 0, 1 when runs failed, 2 for a mistake, 130 after Ctrl-C.
    """
    show_any_text()
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `locogen models | head`: nobody reads further. Python writes what is left when it ends,
        # and would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LocogenError, OSError) as error:
        print(f"locogen: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locogen",
        description="Find, show and edit where text-to-image models store what they know.",
    )
    parser.add_argument("--version", action="version", version=f"locogen {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a study: notebooks for many concepts and models",
        epilog=_ENGINES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "study",
        type=Path,
        metavar="STUDY.toml",
        help="file of notebooks, models, concepts, parameters; results go to a folder next to it",
    )
    run.add_argument("--force", action="store_true", help="also repeat finished runs")
    run.add_argument(
        "--only", action="append", metavar="SLUG", help="execute only this run (can be repeated)"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the plan, without starting a run",
    )
    run.add_argument("--retry", choices=["failed"], help="also repeat failed runs")
    run.add_argument(
        "--keep-going",
        action="store_true",
        help="start further runs after a failure (default: only finish those that are running)",
    )
    run.add_argument(
        "--engine",
        choices=["serial", "processes", "dask"],
        help="where to run, see below (default: processes)",
    )
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of runs at the same time (default: what the machine has room for)",
    )
    run.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="address of a Dask scheduler; its workers execute the runs",
    )
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="make HTML pages from a study's results")
    report.add_argument("folder", type=Path, metavar="DIR", help="the study's results folder")
    report.add_argument(
        "--open", action="store_true", help="open them in a browser, if there is a display"
    )
    report.set_defaults(command=_report)

    models = commands.add_parser("models", help="list the models that locogen knows by name")
    models.set_defaults(command=_models)

    concepts = commands.add_parser("concepts", help="list the concepts that locogen knows by id")
    concepts.add_argument("model", nargs="?", metavar="MODEL", help="list only those of this model")
    concepts.add_argument(
        "--file", type=Path, metavar="FILE.toml", help="also list those of this file"
    )
    concepts.set_defaults(command=_concepts)
    return parser


# Each command imports what it needs: `locogen --help` should not wait for pandas and papermill.


def _run(options: argparse.Namespace) -> int:
    from locogen.studies.study import StudyFailed, run_study

    try:
        run_study(
            options.study,
            only=options.only,
            force=options.force,
            retry_failed=options.retry == "failed",
            keep_going=options.keep_going,
            dry_run=options.dry_run,
            engine=options.engine or ("dask" if options.scheduler else "processes"),
            workers=options.workers,
            scheduler=options.scheduler,
        )
    except StudyFailed as error:
        print(f"locogen: {error}", file=sys.stderr)
        return 1
    return 0


def _report(options: argparse.Namespace) -> int:
    from locogen.pages.build import build

    page = build(options.folder).resolve()
    print(page.as_uri())
    if options.open and has_display():
        import webbrowser

        webbrowser.open(page.as_uri())
    return 0


def has_display() -> bool:
    """Whether a browser could show itself: not over ssh, not in a container."""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _models(options: argparse.Namespace) -> int:
    from locogen.catalog import model_table

    columns = ["name", "supported", "family", "size", "layers", "license", "id"]
    _show([columns, *model_table()[columns].to_numpy().tolist()])
    return 0


def _concepts(options: argparse.Namespace) -> int:
    from locogen.catalog import concepts

    table = concepts(options.model, file=options.file)
    _show([list(table.columns), *table.to_numpy().tolist()])
    return 0


def _show(rows: Sequence[Sequence[object]]) -> None:
    """Print rows as columns of text; the first row holds their names."""
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        # The last column needs no padding, which would only make lines wrap.
        print("  ".join(cells).rstrip())


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
