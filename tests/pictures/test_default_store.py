"""The default store: a run that was stopped or is repeated goes on; what it is, how large, how it is emptied."""

import sys
from pathlib import Path

import pytest
from PIL import Image
from support import tiny

from locogen.__main__ import main
from locogen.files import AUTO
from locogen.interventions.prompts import intervene
from locogen.localization.scored_pictures import with_store
from locogen.pictures import default_store, runs
from locogen.pictures.default_store import place_of, shortened, store_folder
from locogen.pictures.runs import generate
from locogen.plan import Intervention

# The suite's own fixture replaces it for every test: here it is looked at.
FOLDER_IN_CACHE = default_store._folder_in_cache
FAST = {"num_inference_steps": 2, "batch_size": 2, "progress": False}
ROWS = [Intervention("cat in a", "dog", (0,), seed) for seed in range(5)]


@pytest.fixture(scope="module")
def pipe():
    return tiny.small()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(default_store, "_folder_in_cache", FOLDER_IN_CACHE)
    monkeypatch.setenv("LOCOGEN_CACHE", str(tmp_path / "cache"))
    default_store._warn_not_writable.cache_clear()
    default_store.warn_if_large.cache_clear()
    return tmp_path / "cache" / "pictures"


def calls(pipe, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Numbers of pictures that were made together; an interrupt comes in the call `stop_at`."""
    sizes: list[int] = []
    make = runs.pictures_of

    def made(*arguments, **options):
        for batch in make(*arguments, **options):
            if len(sizes) == stop_at:
                raise KeyboardInterrupt
            sizes.append(len(batch.rows))
            yield batch

    monkeypatch.setattr(runs, "pictures_of", made)
    return sizes


def test_a_repeated_run_makes_nothing(pipe, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(pipe, monkeypatch)
    first = generate(pipe, ROWS, **FAST)
    assert first.pictures.store.folder == cache == store_folder()
    assert sum(made) == 5
    generate(pipe, ROWS, **FAST)
    assert sum(made) == 5
    generate(pipe, ROWS, store=None, **FAST)
    assert sum(made) == 10, "the twin: none is kept"


def test_a_stopped_run_goes_on(pipe, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        made = calls(pipe, patch, stop_at=1)
        with pytest.raises(KeyboardInterrupt) as stopped:
            generate(pipe, ROWS, **FAST)
    assert str(stopped.value) == f"stopped at {made[0]} of 5; they are kept in {shortened(cache)}"
    rest = calls(pipe, monkeypatch)
    generate(pipe, ROWS, **FAST)
    assert sum(rest) == 5 - made[0]


def test_a_run_that_was_begun_before_counts_all_its_pictures(
    pipe, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(pipe, ROWS[:3], **FAST)
    calls(pipe, monkeypatch, stop_at=0)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped at 3 of 5; they are kept in "):
        generate(pipe, ROWS, **FAST)


def test_without_a_store_nothing_is_promised(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls(pipe, monkeypatch, stop_at=1)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped at \d of 5; they are not kept$"):
        generate(pipe, ROWS, store=None, **FAST)


def test_a_search_without_a_store_promises_nothing_either() -> None:
    from types import SimpleNamespace

    from locogen.localization.scored_pictures import ScoredPictures

    def make(pictures):
        raise KeyboardInterrupt("stopped at 3 of 5; they are kept in /tmp/x")

    asked = ScoredPictures(None, (), SimpleNamespace(), SimpleNamespace(), None, False)  # pyright: ignore
    with pytest.raises(KeyboardInterrupt, match=r"^stopped; without a store no picture is kept$"):
        with_store(asked, make)


def test_pictures_of_unknown_code_are_not_kept_for_good(pipe, cache: Path) -> None:
    hook = pipe.unet.register_forward_hook(lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="made afresh"):
            run = generate(pipe, ROWS[:1], **FAST)
    finally:
        hook.remove()
    assert run.pictures.store.folder != cache and not cache.exists()
    with intervene(pipe, ROWS[:1]):
        pass  # the pipeline is as it was


def test_a_cache_that_cannot_be_written_costs_no_run(
    pipe, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LOCOGEN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written, so pictures are kept in a temporary"):
        run = generate(pipe, ROWS[:1], **FAST)
    assert run.pictures[0].size
    assert place_of(AUTO) is None, "and says so once"


def test_what_store_means(cache: Path, tmp_path: Path) -> None:
    assert place_of(AUTO) == cache and cache.is_dir()
    assert place_of(None) is None
    assert place_of(str(tmp_path)) == tmp_path


def test_paths_do_not_name_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert shortened(tmp_path / "x") == str(Path("~") / "x")
    assert shortened(tmp_path.parent / "y") == str(tmp_path.parent / "y")


def test_a_run_names_its_store_and_the_size(pipe, cache: Path, tmp_path: Path) -> None:
    run = generate(pipe, ROWS[:2], **FAST)
    assert f"{shortened(cache)}, which holds 2 pictures, " in run._repr_html_()
    own = generate(pipe, ROWS[:2], store=tmp_path / "own", **FAST)
    assert "own" in own._repr_html_() and "which holds" not in own._repr_html_()


def test_a_large_cache_says_so_once(pipe, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_store, "LARGE", 1)
    with pytest.warns(UserWarning, match="`locogen clean` empties it"):
        generate(pipe, ROWS[:1], **FAST)
    generate(pipe, ROWS[1:2], **FAST)


def test_clean_deletes_what_locogen_wrote(
    pipe, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["clean"]) == 0 and "0 pictures, 0 bytes" in capsys.readouterr().out
    generate(pipe, ROWS[:2], **FAST)
    written = {file.name for file in cache.iterdir()}
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".png", ".png"]
    key = "0123456789abcdef" * 2
    (cache / f".{key}.png.1-2.partial").write_bytes(b"x" * 600)
    mine = ["holiday.png", "mine.txt", "run-1.json"]  # LOCOGEN_CACHE may name any folder
    for name in mine:
        (cache / name).write_bytes(b"x" * 600)
    assert main(["clean"]) == 2 and "add --yes" in capsys.readouterr().err
    assert written < {file.name for file in cache.iterdir()}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "no")
    assert main(["clean"]) == 0 and capsys.readouterr().out.endswith("kept\n")
    monkeypatch.setattr("builtins.input", lambda _: " Yes")
    assert main(["clean"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("deleted\n") and "2 pictures, " in said and "more have" not in said
    assert sorted(file.name for file in cache.iterdir()) == mine
    assert main(["clean", "--yes"]) == 0


def test_clean_leaves_what_only_has_such_a_name(
    pipe, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other programs name pictures by 32 digits too, such as those of md5."""
    generate(pipe, ROWS[:1], **FAST)
    (record,) = cache.glob("run-*.json")
    (picture,) = cache.glob("*.png")
    digits = (f"{number:032x}" for number in range(9))
    Image.open(picture).save(cache / f"{next(digits)}.png")  # without the digest
    (cache / f"{next(digits)}.png").write_bytes(b"")
    (cache / f".{next(digits)}.png").write_bytes(picture.read_bytes())  # no store hides them
    for content in (record.read_text(), "{}", "[]", "no JSON"):
        (cache / f"run-{next(digits)}.json").write_text(content)
    mine = {file.name for file in cache.iterdir()} - {record.name, picture.name}
    assert main(["clean", "--yes"]) == 0
    said = capsys.readouterr().out
    assert {file.name for file in cache.iterdir()} == mine and len(mine) == 7
    assert "1 picture, " in said and "6 more have such names" in said


def test_the_home_folder_in_a_variable_is_ones_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter's %env, Docker and systemd do not expand it."""
    monkeypatch.setenv("LOCOGEN_CACHE", "~/cache")
    assert store_folder() == Path.home() / "cache" / "pictures"
    monkeypatch.setenv("LOCOGEN_CACHE", "cache")
    assert store_folder().is_absolute()
