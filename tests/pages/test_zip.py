"""One file to send: all pages and what they link to, without the store."""

from zipfile import ZipFile

import pytest

from locogen.errors import LocogenError
from locogen.pages.build import write_zip


def test_pages_are_sent_without_the_store(tmp_path):
    results = tmp_path / "mine"
    for name in ("index.html", "neon/index.html", "neon/pictures/a.png", "store/b.png", ".lock"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(name)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (results / "neon" / "link.txt").symlink_to(secret)
    write_zip(results, results / "send.zip")
    write_zip(results, results / "send.zip")  # a second one does not hold the first
    with ZipFile(results / "send.zip") as sent:
        names = set(sent.namelist())
    assert names == {"mine/index.html", "mine/neon/index.html", "mine/neon/pictures/a.png"}


def test_without_pages_there_is_nothing_to_send(tmp_path):
    with pytest.raises(LocogenError, match="locogen report"):
        write_zip(tmp_path, tmp_path / "send.zip")
    assert not (tmp_path / "send.zip").exists()
