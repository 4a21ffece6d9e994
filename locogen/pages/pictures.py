"""The pictures that pages show of a run, copied from its store.

Results come from anywhere. Of the names in `pictures.csv` only the last part counts, links are not
followed, and stores are looked for only in the study's folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
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
            file = picture_file(entry.run, name)
            if file is not None:
                files[label] = own_copy(entry.run, file)
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


def picture_file(run: Finished, name: str, stores: Iterable[Path] | None = None) -> Path | None:
    """Where a picture is: in the run's `pictures/`, or else in a store; None if it is nowhere.

    Args:
        run: The run.
        name: The picture's name, as the run's tables have it.
        stores: From `stores_of`, for whoever asks often; None: they are looked for.
    """
    name = Path(name).name  # "../../secret.png" is looked for as "secret.png"
    if not name.endswith(".png"):
        return None
    copies = run.folder / "pictures"
    # Writing through a link would write outside of the results folder.
    if copies.is_symlink() or (copies / name).is_symlink():
        return None
    if (copies / name).is_file():
        return copies / name
    for store in stores_of(run) if stores is None else stores:
        original = store / name
        if original.is_file() and not original.is_symlink():
            return original
    return None


def own_copy(run: Finished, original: Path) -> Path:
    """A picture in the run's `pictures/`, copied there if it is not there yet.

    Args:
        run: The run.
        original: From `picture_file`.

    Raises:
        CannotWrite: The run's folder takes no files.
    """
    copy = run.folder / "pictures" / original.name
    if original != copy:
        with writing(run.folder):
            copy.parent.mkdir(exist_ok=True)
        write_whole(copy, original.read_bytes())
    return copy


def stores_of(run: Finished) -> Iterator[Path]:
    """Where pictures of a run may be: its results' store, and the one that its parameters name.

    The latter only if it is a picture store in the study's folder: results could name any place,
    such as a folder of somebody's photographs.
    """
    results = run.folder.parent.absolute()
    yield results / "store"
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
