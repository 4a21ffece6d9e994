"""The command line: one question (`localize`, `edit`, `neurons`), or a study (`run`, `report`)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen import __version__
from locogen.console import show_any_text
from locogen.errors import LocogenError

if TYPE_CHECKING:
    from locogen.questions import Question

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


_FIRST_STEPS = """\
locogen finds, shows and edits where text-to-image models store what they know. First steps:

  locogen localize neon                 which layers of the mini model carry neon? One page
  locogen edit neon --layers 12-13      edit it away there, and see what else goes
  locogen notebooks my-notebooks        the same and more, cell by cell in JupyterLab
  locogen new my-study.toml             many models, concepts and settings at once
  locogen models, locogen concepts      what it knows by name

`locogen --help` lists all commands, `locogen COMMAND --help` says what each one takes.
"""

_EXAMPLE_STUDY = """\
# A study: `locogen run {file}` runs it, `locogen report {folder}` makes its pages.
# Every run is a notebook with parameters; runs are the product of the lists below.

title = "Where mini keeps styles"
notebook = "localize"                       # one of locogen's, or a path from here: "mine.ipynb"
models = ["mini"]                           # names (`locogen models`), hub ids, or folders
concepts = ["mini/neon", "mini/van-gogh"]   # ids (`locogen concepts`)

# Parameters that are the same in every run; the first cell of the notebook lists them all.
[defaults]
seeds = 4
max_prompts = 2
num_inference_steps = 6
# concepts_file = "my-concepts.toml"        # your own concepts

# Each of these is tried with each of the others.
[grid]
window = [1, 2]

# Runs for which all of this is true are left out.
# [[exclude]]
# model = "mini"
# window = 1

# Tables like this one replace the product: each has parameters and lists of its own.
# [[run]]
# notebook = "edit"
# name = "edit-neon"
# concept = "mini/neon"
# layers = "12-13"
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
    if options.command is None:
        print(_FIRST_STEPS, end="")
        return 0
    try:
        return options.command(options)
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            print(f"locogen: {interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `locogen models | head`: nobody reads further. Python writes what is left when it ends,
        # and would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LocogenError, OSError) as error:
        print(f"locogen: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locogen",
        description="Find, show and edit where text-to-image models store what they know.",
    )
    parser.add_argument("--version", action="version", version=f"locogen {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_questions(commands)

    run = commands.add_parser(
        "run",
        help="run a study: notebooks for many concepts and models",
        epilog=_run_help(),
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
    report.add_argument(
        "--zip",
        type=Path,
        metavar="FILE.zip",
        help="also write all pages to one file to send; the store's pictures are left out",
    )
    report.set_defaults(command=_report)

    notebooks = commands.add_parser("notebooks", help="copy locogen's notebooks into a folder")
    notebooks.add_argument("folder", type=Path, metavar="DIR", help="made if it is not there")
    notebooks.set_defaults(command=_notebooks)

    new = commands.add_parser("new", help="write an example of a study's file, with comments")
    new.add_argument("file", type=Path, metavar="STUDY.toml", help="must not be there yet")
    new.set_defaults(command=_new)

    clean = commands.add_parser(
        "clean", help="say how large the default store is, and delete its pictures"
    )
    clean.add_argument("--yes", action="store_true", help="delete without asking")
    clean.set_defaults(command=_clean)

    models = commands.add_parser("models", help="list the models that locogen knows by name")
    models.add_argument("--json", action="store_true", help="with licenses and usual settings")
    models.set_defaults(command=_models)

    concepts = commands.add_parser("concepts", help="list the concepts that locogen knows by id")
    concepts.add_argument("model", nargs="?", metavar="MODEL", help="list only those of this model")
    concepts.add_argument(
        "--file", type=Path, metavar="FILE.toml", help="also list those of this file"
    )
    concepts.add_argument("--json", action="store_true", help="as a list of objects")
    concepts.set_defaults(command=_concepts)
    return parser


def _add_questions(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that answer one question with a page."""
    localize = _question(commands, "localize", "find the layers that carry a concept")
    localize.add_argument("--window", type=int, metavar="N", help="layers in a window")
    localize.add_argument(
        "--search",
        choices=["all", "race", "attribute"],
        help="every window (default); a race; or those that gradients propose, the quickest",
    )

    edit = _question(commands, "edit", "edit a concept away, and measure what else goes")
    _add_layers(edit)
    edit.add_argument("--ridge", type=float, metavar="X", help="large: keep more of the weights")
    edit.add_argument("--tokens", help="states to edit: last_subject, subject, end or all")
    edit.add_argument("--becomes", metavar="TEXT", help="what the concept should turn into")
    edit.add_argument(
        "--attacks",
        metavar="KINDS",
        help="also try to bring it back, such as closed,inversion (`loco.attack_kinds()`)",
    )
    edit.add_argument(
        "--lora", type=Path, metavar="FILE.safetensors", help="also write the edit as LoRA here"
    )

    neurons = _question(commands, "neurons", "find the neurons of these layers that carry it")
    _add_layers(neurons)


# What the notebooks take where --steps is left out.
_STEPS = {"localize": "0, the model's own number", "edit": "20", "neurons": "12"}


def _question(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], notebook: str, words: str
) -> argparse.ArgumentParser:
    """A command that runs one notebook on one concept, with the options that all of them share."""
    parser = commands.add_parser(
        notebook,
        help=words,
        epilog="Run again, it continues. The parameters are those of the notebook of that name.",
    )
    parser.add_argument(
        "concept",
        metavar="CONCEPT",
        help="id or name of a concept (`locogen concepts`), or a prompt, with --target",
    )
    parser.add_argument(
        "--target",
        metavar="PROMPT",
        help="the prompt without what is looked for; for a fact, with another answer",
    )
    parser.add_argument("--kind", choices=["style", "object", "fact"], help="what it is")
    parser.add_argument("--name", default="", help="what to call it on the page")
    parser.add_argument("--file", default="", metavar="FILE.toml", help="your own concepts")
    parser.add_argument("--model", default="mini", help="name, folder or hub id (default: mini)")
    parser.add_argument(
        "--models-file", metavar="FILE.toml", help="your own models, which --model then names"
    )
    parser.add_argument("--device", metavar="cpu|cuda|mps")
    parser.add_argument("--dtype", metavar="float32|float16|bfloat16")
    parser.add_argument("--offload", choices=["model", "sequential"])
    parser.add_argument("--seeds", type=int, metavar="N", help="pictures for each prompt")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"denoising steps (default: {_STEPS[notebook]})"
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="at most this many prompts")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="DIR",
        help="folder for results and pages (default: locogen-results/ and a name)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.set_defaults(command=_ask, notebook=notebook)
    return parser


def _add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers",
        default="found",
        metavar="8-9",
        help="layers, or `found`: localize first, and take what that finds (default)",
    )


# Each command imports what it needs: `locogen --help` should not wait for pandas and papermill.


def _run(options: argparse.Namespace) -> int:
    from locogen.studies.study import run_study

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
    return 0


def _report(options: argparse.Namespace) -> int:
    _show_page(options.folder, options.open)
    if options.zip is not None:
        if options.zip.is_dir() or not options.zip.parent.is_dir():
            raise LocogenError(f"--zip {options.zip}: give a file in a folder that is there")
        from locogen.pages.build import write_zip

        write_zip(options.folder, options.zip)
        print(options.zip)
    return 0


def _notebooks(options: argparse.Namespace) -> int:
    from locogen.studies.notebooks import copy_notebooks

    names = copy_notebooks(options.folder)
    print(f"{len(names)} notebooks in {options.folder}: jupyter lab {options.folder / names[0]}")
    return 0


def _clean(options: argparse.Namespace) -> int:
    from locogen.pictures.default_store import (
        delete,
        is_stored,
        named_as_stored,
        store_folder,
        total_of,
    )

    folder = store_folder()
    named = named_as_stored(folder)
    files = [file for file in named if is_stored(file)]
    print(f"{folder}: {total_of(files)}")
    if len(named) > len(files):
        print(
            f"{len(named) - len(files)} more have such names, but not what locogen writes: they "
            "stay, delete them by hand if you know them"
        )
    if not files:
        return 0
    if not options.yes and not _agreed():
        print("kept")
        return 0
    delete(files)
    print("deleted")
    return 0


def _agreed() -> bool:
    """Whether the person at the keyboard says yes."""
    if not sys.stdin.isatty():
        raise LocogenError("nobody is there to be asked: add --yes to delete these files")
    return input("Delete these files? Stopped runs then begin anew. [y/N] ").strip().lower() in (
        "y",
        "yes",
    )


def _new(options: argparse.Namespace) -> int:
    if options.file.suffix != ".toml":
        raise LocogenError(f"{options.file}: give a name that ends in .toml")
    if not options.file.parent.is_dir():
        raise LocogenError(f"the folder {options.file.parent} is not there: make it first")
    text = _EXAMPLE_STUDY.format(file=options.file, folder=options.file.with_suffix(""))
    try:
        with options.file.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise LocogenError(f"{options.file} is there already: give another name") from None
    print(f"{options.file}: edit it, then locogen run {options.file}")
    return 0


def _show_page(results: Path, is_opened: bool) -> None:
    """Make the pages of a results folder, and say where they are."""
    from locogen.pages.build import build

    page = build(results).resolve()
    print(page.as_uri())
    if is_opened and has_display():
        import webbrowser

        webbrowser.open(page.as_uri())


def _ask(options: argparse.Namespace) -> int:
    """Answer one question: run its notebook as a study of one run, and make the page."""
    from locogen.questions import Question, check_question, copy_lora, found_layers

    parameters = _parameters(options)
    question = Question(
        options.notebook,
        options.concept,
        target=options.target,
        kind=options.kind or "",
        name=options.name,
        concepts_file=options.file,
        model=options.model,
        parameters=parameters,
    )
    lora: Path | None = getattr(options, "lora", None)
    layers: str | None = getattr(options, "layers", None)
    if lora is not None:
        _check_lora(lora)
    if layers == "found":
        # The localization takes minutes: a value that the second step refuses is named before it.
        # Which layers will be found is not known yet, and every model has a first one.
        second_step = replace(question, parameters=parameters | {"layers": "0"})
        check_question(second_step, _place(options.into, question, ""))
        localize = replace(question, notebook="localize", parameters=_shared(parameters))
        results = _answered(localize, _place(options.into, localize, "localize"))
        parameters["layers"] = found_layers(results)
        print(f"layers {parameters['layers']}, by the localization in {results}")
    elif layers is not None:
        parameters["layers"] = layers
    results = _answered(question, _place(options.into, question, ""))
    if lora is not None:
        copy_lora(results, lora)
        print(lora)
    _show_page(results, options.open)
    return 0


def _check_lora(file: Path) -> None:
    """Raise `LocogenError` where no LoRA could be written, before minutes are spent on it."""
    if not file.parent.is_dir():
        raise LocogenError(f"--lora {file}: the folder {file.parent} is not there; make it first")
    if file.is_dir():
        raise LocogenError(f"--lora {file} is a folder: give a file, such as off.safetensors")
    if file.suffix != ".safetensors":
        raise LocogenError(
            f"--lora {file}: a LoRA is a file of safetensors, so let its name end in .safetensors, "
            f"such as {file.with_suffix('.safetensors')}"
        )


# Options of questions → parameters of their notebooks.
_PARAMETERS = {
    "device": "device",
    "dtype": "dtype",
    "offload": "offload",
    "seeds": "seeds",
    "steps": "num_inference_steps",
    "prompts": "max_prompts",
    "window": "window",
    "search": "search",
    "ridge": "ridge",
    "tokens": "tokens",
    "becomes": "becomes",
    "attacks": "attacks",
}


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    """What the notebook gets: what was said; all else has the notebook's own default."""
    parameters = {}
    for option, parameter in _PARAMETERS.items():
        value = getattr(options, option, None)
        if value is not None:
            parameters[parameter] = value
    if options.models_file is not None:
        parameters["models_file"] = str(Path(options.models_file).absolute())
    if options.notebook == "neurons":
        # Its second concept is one of the mini model's.
        parameters["other"] = ""
    return parameters


def _shared(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters that a localization takes too."""
    common = ("models_file", "device", "dtype", "offload", "seeds", "max_prompts")
    common += ("num_inference_steps",)
    return {name: parameters[name] for name in common if name in parameters}


def _place(into: Path | None, question: Question, part: str) -> Path:
    """Where the study of a question lies; the part keeps two of one call apart."""
    if into is None:
        return Path("locogen-results") / question.slug
    return into / part


def _answered(question: Question, folder: Path) -> Path:
    """Run the study of a question; its results folder."""
    from locogen.questions import write_study
    from locogen.studies.study import run_study

    study = write_study(question, folder)
    print(study)
    return run_study(study, engine="serial", retry_failed=True)


def has_display() -> bool:
    """Whether a browser could show itself: not over ssh, not in a container."""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _models(options: argparse.Namespace) -> int:
    from locogen.catalog import model_table

    table = model_table()
    if options.json:
        print(table.to_json(orient="records", indent=1, force_ascii=False))
        return 0
    columns = ["name", "supported", "size", "layers", "id"]
    _show([columns, *table[columns].to_numpy().tolist()])
    print("Licenses, families and usual settings: locogen models --json")
    return 0


def _concepts(options: argparse.Namespace) -> int:
    from locogen.catalog import concepts

    table = concepts(options.model, file=options.file)
    if options.json:
        print(table.to_json(orient="records", indent=1, force_ascii=False))
        return 0
    _show([list(table.columns), *table.to_numpy().tolist()])
    return 0


def _run_help() -> str:
    example = _EXAMPLE_STUDY.format(file="STUDY.toml", folder="STUDY")
    indented = "".join(f"  {line}" for line in example.splitlines(keepends=True))
    return f"an example of a study's file (`locogen new` writes it):\n{indented}\n{_ENGINES}"


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
