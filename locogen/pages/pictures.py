"""The pictures that pages show of a run: baseline, carrier and ceiling, copied from its store.

Results come from anywhere. Of the names in `pictures.csv` only the last part counts, links are not
followed, and stores are looked for only in the study's folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locogen.files import write_whole, writing
from locogen.pages.entries import Entry
from locogen.pages.results import Finished, read_study_facts, read_table
from locogen.views.tables import strip_rows


def shown_pictures(entry: Entry) -> dict[str, Path]:
    """Baseline, carrier and ceiling of an entry's first prompt and seed.

    They are copied from the store into the run's own `pictures/`, so that a results folder shows
    them without its store.

    Args:
        entry: An entry of a run that succeeded.

    Returns:
        Label → file; empty without usable pictures.
    """
    files = {}
    # `pictures.csv` is not checked when it is read, and `pictures/` may be anything but a folder.
    try:
        for label, name in _picture_names(entry).items():
            file = _own_copy(entry.run, name)
            if file is not None:
                files[label] = file
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        return {}
    return files


def _picture_names(entry: Entry) -> dict[str, str]:
    """Label → name of the picture, as `pictures.csv` has it."""
    table: Any = read_table(entry.run.folder / "pictures.csv")
    # Baseline and ceiling have no width: they belong to windows of any width.
    of_width = table["width"].isna() | (table["width"] == entry.row["width"])
    rows = table[(table["concept"] == entry.concept) & of_width]
    rows = strip_rows(rows, entry.run.carriers[entry.concept]).drop_duplicates("label")
    rows = rows[rows["marked"] | (rows["role"] != "window")]
    pairs = zip(rows["label"], rows["image"], strict=True)
    return {str(label): str(name) for label, name in pairs}


def _own_copy(run: Finished, name: str) -> Path | None:
    """A picture in the run's `pictures/`, copied from a store if it is not there yet."""
    name = Path(name).name  # "../../secret.png" is looked for as "secret.png"
    copy = run.folder / "pictures" / name
    # Writing through a link would write outside of the results folder.
    if copy.parent.is_symlink() or copy.is_symlink() or not name.endswith(".png"):
        return None
    if copy.is_file():
        return copy
    for store in (run.folder.parent / "store", *_named_stores(run)):
        original = store / name
        if original.is_file() and not original.is_symlink():
            with writing(run.folder):
                copy.parent.mkdir(exist_ok=True)
            write_whole(copy, original.read_bytes())
            return copy
    return None


def _named_stores(run: Finished) -> Iterator[Path]:
    """The store that the run's parameters name, if it is a picture store in the study's folder.

    Results could name any place, such as a folder of somebody's photographs.
    """
    results = run.folder.parent.absolute()
    base = _study_folder(results)
    name = run.group("parameters").get("store")
    if not isinstance(name, str) or not name:
        return
    store = (base / name).resolve()
    is_inside = store != base and store.is_relative_to(base)
    # Every store holds the record of at least one run.
    if is_inside and any(store.glob("run-*.json")):
        yield store


def _study_folder(results: Path) -> Path:
    """The folder of the study's file: `study.json` says how many levels up it is, usually one."""
    up = read_study_facts(results).get("base", "")
    # Nothing but "." or "../..": a base of "/" would put every folder inside the study's.
    if not re.fullmatch(r"\.|\.\.(/\.\.)*", up):
        up = ".."
    return Path(os.path.normpath(results / up)).resolve()
