"""A run's pictures on its page: small ones inside it, within so many bytes, full ones beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from locogen.files import data_uri
from locogen.pages.pictures import own_copy, picture_file, stores_of
from locogen.pages.results import Finished
from locogen.pages.thumbnails import picture_size, small_picture

SIZES = (384, 256, 192, 128, 96, 64)  # pixels; the largest one with which all pictures fit is taken
PER_PICTURE = 100  # bytes of a page for the address of a full picture
BESIDE = 60_000_000  # bytes of full pictures beside a page
LARGE_PICTURES = 128  # pixels; with larger ones a page may be larger too
PAGE = 1_500_000  # bytes of a page with pictures up to that size
PAGE_OF_LARGE = 4_000_000


@dataclass
class Album:
    """The small pictures of a page, each once, with the addresses of the full ones."""

    shown: list[dict[str, str]] = field(default_factory=list)
    """`source`, a `data:` address; `file`, the full picture's, empty where it is not beside."""
    places: dict[str, int] = field(default_factory=dict)
    """The picture's name in the tables → its place in `shown`."""
    groups: int = 0
    """How many of the groups are there whole; a picture that is lost does not count."""

    def place(self, name: object) -> int | None:
        """Where the picture of this name is in `shown`; None if it is not there."""
        return self.places.get(str(name))


def page_limit(run: Finished, names: Iterable[str]) -> int:
    """The bytes that the run's page may have: more where its pictures are large.

    Args:
        run: The run.
        names: Of its pictures; the first that is found tells their size.
    """
    stores = tuple(stores_of(run))
    for name in names:
        file = picture_file(run, name, stores)
        if file is not None:
            return PAGE_OF_LARGE if picture_size(file) > LARGE_PICTURES else PAGE
    return PAGE


def make_album(
    run: Finished, groups: Sequence[Sequence[str]], budget: int, words: Sequence[int] = ()
) -> Album:
    """Make the small pictures of a page, and copy the full ones beside it.

    Args:
        run: The run.
        groups: Names of pictures that are only of use together, the most important groups first.
        budget: Bytes that the small pictures may have in the page, with all that the page says of
            them. Groups that are too many are left out; full pictures end where they have too many
            bytes together.
        words: Bytes of what the page says of each group; (): next to nothing.

    Returns:
        The album; without any picture if the store is gone.
    """
    files = _files(run, groups)
    words = words or [0] * len(groups)
    size = _fitting_size(list(files.values()), budget - sum(words) - PER_PICTURE * len(files))
    album = Album()
    beside = _Beside(run)
    for group, of_words in zip(groups, words, strict=True):
        new = [name for name in dict.fromkeys(group) if name in files and name not in album.places]
        additions = _smalls({name: files[name] for name in new}, size)
        budget -= of_words + sum(len(source) + PER_PICTURE for source in additions.values())
        if budget < 0:
            break
        for name, source in additions.items():
            album.places[name] = len(album.shown)
            album.shown.append({"source": source, "file": beside.address_of(files[name])})
        album.groups += 1
    return album


@dataclass
class _Beside:
    """The full pictures beside a page."""

    run: Finished
    size: int = 0  # bytes

    def address_of(self, file: Path) -> str:
        """Of a copy beside the page; "" where there are too many bytes already."""
        self.size += file.stat().st_size
        if self.size > BESIDE:
            return ""
        return f"pictures/{quote(own_copy(self.run, file).name)}"


def _files(run: Finished, groups: Iterable[Iterable[str]]) -> dict[str, Path]:
    """Name → file, of all pictures that are there."""
    stores = tuple(stores_of(run))
    files = {}
    for name in dict.fromkeys(name for group in groups for name in group):
        file = picture_file(run, name, stores)
        if file is not None:
            files[name] = file
    return files


def _smalls(files: Mapping[str, Path], size: int) -> dict[str, str]:
    """Name → small picture, as a `data:` address; what cannot be read has none."""
    smalls = {name: small_picture(file, size) for name, file in files.items()}
    return {
        name: data_uri(small, "image/webp") for name, small in smalls.items() if small is not None
    }


def _fitting_size(files: Sequence[Path], budget: int) -> int:
    """The largest size with which all pictures should fit, judged by a few of them."""
    few = files[:: max(1, len(files) // 8)]
    for size in SIZES:
        smalls = [small_picture(file, size) for file in few]
        lengths = [len(data_uri(small, "image/webp")) for small in smalls if small is not None]
        if not lengths or sum(lengths) / len(lengths) * len(files) <= 0.9 * budget:
            return size
    return SIZES[-1]
