"""One question from the command line: from a concept, or a prompt, to a page.

A question becomes a study of one run, in a folder of its own: it is resumed, repeated and shown as
every study is, and its files say what was asked.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.files import ENCODING, replacing, toml_lines, writing
from locogen.finding import Finding
from locogen.phrasings import exchanged
from locogen.plan import KINDS, PromptPair
from locogen.studies.planning import read_study, slugify
from locogen.studies.records import read_record

if TYPE_CHECKING:
    from pandas import DataFrame

STUDY = "study.toml"
CONCEPTS = "concepts.toml"
# What their first line says: no other file is written over.
_OURS = "# Written by locogen for one question; the next question in this folder writes it anew."
_OWN = "asked/concept"  # id of a concept that no catalog has

# What a style or an object that is only named is asked about with: plain words of any model.
_THINGS = ("a house", "a dog", "a boat")
_TEMPLATES = {
    "style": {"prompt": "{} in the style of {name}", "target": "{}", "fill": list(_THINGS)},
    "object": {"prompt": "a picture of a {name}", "target": "a picture"},
}
_MARKS_OF_STYLE = ("in the style of ", "style of ", "by ")


@dataclass(frozen=True)
class Question:
    """What somebody wants to know.

    Attributes:
        notebook: The notebook that answers it.
        concept: Id or name of a concept of the catalog; or, with a target, a prompt; or the name of
            a style or an object.
        target: The prompt without what is looked for (style, object), or with another answer
            (fact); "": nothing at all; None: `concept` is no prompt.
        kind: "style", "object" or "fact"; "": as the catalog, or the words of the prompt, say.
        name: What to call a concept that is given by its prompt; "": the words that are exchanged.
        concepts_file: A TOML file with concepts; "": the catalog alone.
        model: Name, folder or hub id of the model.
        parameters: Other parameters of the notebook; None: its default.
    """

    notebook: str
    concept: str
    target: str | None = None
    kind: str = ""
    name: str = ""
    concepts_file: str = ""
    model: str = "mini"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """A name for its folder."""
        return slugify(f"{self.notebook} {self.concept} {self.target or ''} {self.model}")


def write_study(question: Question, folder: Path) -> Path:
    """Write the study that answers a question, and the concept if no catalog has it.

    Args:
        question: What is asked.
        folder: Where the files go; results will go there too.

    Returns:
        The study's TOML file; `locogen.studies.study.run_study` runs it.

    Raises:
        LocogenError: For a concept that is neither known nor described, and for values that the
            notebook does not take.

    Example:
        >>> import tempfile
        >>> question = Question("localize", "a house in the style of gogh", target="a house")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     study = write_study(question, Path(folder))
        ...     for line in study.with_name("concepts.toml").read_text().splitlines()[1:]:
        ...         print(line)
        ["asked/concept"]
        name = "gogh"
        kind = "style"
        pairs = [{"prompt" = "a house in the style of gogh", "target" = "a house"}]
    """
    files = _checked_files(question, folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        _write(folder / name, lines)
    return folder / STUDY


def check_question(question: Question, folder: Path) -> None:
    """Refuse what `write_study` would refuse, and write nothing.

    Args:
        question: As for `write_study`.
        folder: Where its files would go.

    Raises:
        LocogenError: As `write_study` does.

    Example:
        >>> check_question(Question("edit", "mini/neon", parameters={"ridge": 0.5}), Path("neon"))
    """
    _checked_files(question, folder)


def _checked_files(question: Question, folder: Path) -> dict[str, Sequence[str]]:
    """Name → lines of the files of a question; refused if its notebook would refuse them."""
    entry = _new_concept(question)
    _check_folder(folder)
    files: dict[str, Sequence[str]] = {STUDY: _study_lines(question, entry)}
    if entry is not None:
        files[CONCEPTS] = [f'["{_OWN}"]', *toml_lines(entry)]
    _check(files, folder)
    return files


def _check(files: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Check every value before a file is written where it would stay, or a kernel is started."""
    with tempfile.TemporaryDirectory(prefix="locogen-") as trial:
        for name, lines in files.items():
            _write(Path(trial, name), lines)
        try:
            read_study(Path(trial, STUDY))
        except LocogenError as error:
            raise LocogenError(str(error).replace(trial, str(folder))) from None


def _study_lines(question: Question, entry: Mapping[str, Any] | None) -> list[str]:
    """The lines of the study's file; `entry`: of a concept that no catalog has."""
    parameters = dict(question.parameters)
    concept = _OWN
    if entry is None:
        concept = _known_id(question) or ""
        if question.concepts_file:
            parameters["concepts_file"] = str(Path(question.concepts_file).absolute())
    else:
        parameters["concepts_file"] = CONCEPTS
    model = (
        str(Path(question.model).absolute()) if Path(question.model).is_dir() else question.model
    )
    top = {"title": f"{question.notebook}: {question.concept}", "notebook": question.notebook}
    top |= {"results": "results", "model": model}
    run = {"concept": concept, "name": slugify(entry["name"] if entry else question.concept)}
    lines = [*toml_lines(top), "", "[defaults]", *toml_lines(parameters)]
    return [*lines, "", "[[run]]", *toml_lines(run)]


def found_layers(results: Path) -> str:
    """The layers that a localization in a results folder names, as a parameter of a notebook.

    Args:
        results: The results folder of the study.

    Returns:
        Such as "8,9".

    Raises:
        LocogenError: If it names none; the message has the reason.
    """
    for file in sorted(results.glob("*/result.json")):
        for concept, window in Finding.from_facts(read_record(file).facts).carriers.items():
            if len(window):
                return ",".join(str(layer) for layer in window)
            raise LocogenError(
                f"{concept}: no single place carries it ({window.reason or 'see its page'}): "
                "name the layers, as in --layers 8-9"
            )
    raise LocogenError(f"{results} has no finding: name the layers, as in --layers 8-9")


def copy_lora(results: Path, target: Path) -> None:
    """Copy the LoRA that an edit left in its results to where it is wanted.

    Args:
        results: The results folder of the study.
        target: The file to write.

    Raises:
        LocogenError: If there is none: some families have no LoRA.
    """
    files = sorted(results.glob("*/lora.safetensors"))
    if not files:
        raise LocogenError(
            f"{results} has no LoRA: this family of models loads none; use edit.safetensors there"
        )
    with replacing(target) as temporary:
        shutil.copyfile(files[0], temporary)


def _known_id(question: Question) -> str | None:
    """The id of a concept that the catalog, or the file, has under this id or name."""
    from locogen.catalog import concepts

    table = concepts(file=question.concepts_file or None)
    if question.concept in set(table["id"]):
        return question.concept
    for row in _suitable(question).to_dict("records"):
        if row["name"] == question.concept:
            return str(row["id"])
    return None


def _suitable(question: Question) -> DataFrame:
    """The concepts that the model can be asked about."""
    from locogen.catalog import concepts

    models_file = question.parameters.get("models_file")
    return concepts(question.model, question.concepts_file or None, models_file)


def _new_concept(question: Question) -> dict[str, Any] | None:
    """The entry of a concept that the question describes; None where the catalog has it."""
    if question.kind and question.kind not in KINDS:
        raise LocogenError(f"kind {question.kind!r}: give one of {', '.join(KINDS)}")
    if question.target is not None:
        return _concept_of_prompt(question, question.target)
    if _known_id(question) is not None:
        return None
    if question.kind not in _TEMPLATES:
        raise LocogenError(
            f"{question.concept!r} is no concept of the catalog (`locogen concepts`)"
            f"{_near(question)}: give the prompt without it as --target, or say --kind style or "
            "--kind object"
        )
    template = dict(_TEMPLATES[question.kind])
    template["prompt"] = template["prompt"].replace("{name}", question.concept)
    return {"name": question.concept, "kind": question.kind} | template


def _near(question: Question) -> str:
    """Which concept of the catalog may have been meant."""
    from difflib import get_close_matches

    table = _suitable(question)
    names = [*table["name"], *table["id"]]
    close = get_close_matches(question.concept.replace("-", " "), names, n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _concept_of_prompt(question: Question, target: str) -> dict[str, Any]:
    words = exchanged(PromptPair(question.concept, target))[0] if target else question.concept
    name = words
    for mark in _MARKS_OF_STYLE:
        if name.startswith(mark):
            name = name.removeprefix(mark)
            break  # "style of by …" is a name that begins with "by"
    is_style = name != words or " style of " in question.concept
    kind = question.kind or ("style" if is_style else "object")
    pair = {"prompt": question.concept, "target": target}
    return {"name": question.name or name, "kind": kind, "pairs": [pair]}


def _check_folder(folder: Path) -> None:
    """Refuse a file in the folder's place, and files there that somebody else wrote."""
    if folder.exists() and not folder.is_dir():
        raise LocogenError(f"{folder} is a file: give a folder for the results (--into)")
    for name in (STUDY, CONCEPTS):
        file = folder / name
        if file.exists() and not file.read_text(ENCODING, errors="replace").startswith(_OURS):
            raise LocogenError(
                f"{file} is not of an earlier question, and would be written over: "
                "give another folder (--into)"
            )


def _write(file: Path, lines: Sequence[str]) -> None:
    with writing(file.parent), replacing(file) as temporary:
        temporary.write_text("\n".join([_OURS, *lines]) + "\n", encoding="utf-8")
