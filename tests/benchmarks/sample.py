"""Make `reports/sample/` from what `make demo` left: pages to look at before installing, and the figures of README.

`python tests/benchmarks/sample.py [SLUG ...]`; the first slug gives the strip of pictures.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
from PIL import Image

from locogen import carrier, describe, plot_effect
from locogen.pages.build import build
from locogen.views.plots import plot_strip, strip_rows

SOURCE, TARGET = Path("reports/mini"), Path("reports/sample")
LIMIT = 4_000_000  # bytes in all


def pages(slugs: list[str]) -> None:
    """The index and the pages of some runs, without notebooks and pictures (both are made again by `make demo`)."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, SOURCE.name)  # the pages say what their folder is called
        folder.mkdir()
        shutil.copy(SOURCE / "study.json", folder)
        for slug in slugs:
            shutil.copytree(SOURCE / slug, folder / slug)
        build(folder)
        shutil.rmtree(TARGET, ignore_errors=True)
        shutil.copytree(
            folder,
            TARGET,
            ignore=shutil.ignore_patterns("*.ipynb", "result.json", "study.json", ".*"),
        )
    for page in TARGET.rglob("*.html"):
        text = re.sub(r'<a href="notebook\.ipynb">[^<]*</a>', "", page.read_text("utf-8"))
        # Of the full pictures only those that the other pages link to; the rest are in the page, small.
        text = re.sub(r'"file": "pictures/[^"]*"', '"file": ""', text)
        page.write_text(text, "utf-8")
    linked = "".join(page.read_text("utf-8") for page in TARGET.glob("*.html"))
    for picture in TARGET.glob("*/pictures/*"):
        if picture.relative_to(TARGET).as_posix() not in linked:
            picture.unlink()
    for folder in TARGET.glob("*/pictures"):
        if not any(folder.iterdir()):
            folder.rmdir()


def figures(slugs: list[str]) -> None:
    """`heatmap.png` of every run's concept and `strip.png` of the first slug's."""
    effects = [effects_of(path) for path in sorted(SOURCE.glob("*/effects.csv"))]
    effects.sort(key=lambda table: ["style", "object", "fact"].index(table["kind"].iloc[0]))
    best = {table["concept"].iloc[0]: carrier(table) for table in effects}
    together = pd.concat(effects, ignore_index=True)
    plot_effect(together, carriers=best).figure.savefig(
        TARGET / "heatmap.png", dpi=110, bbox_inches="tight"
    )
    table = pd.read_csv(SOURCE / slugs[0] / "pictures.csv")
    rows = strip_rows(table, best[table["concept"].iloc[0]])
    shown = [Image.open(SOURCE / "store" / name) for name in rows["image"]]
    strip = plot_strip(
        shown, list(rows["label"]), columns=9, marked=rows["marked"].to_numpy().nonzero()[0]
    )
    strip.savefig(TARGET / "strip.png", dpi=110, bbox_inches="tight")
    print(describe(together, best))


def effects_of(path: Path) -> pd.DataFrame:
    """A run's effects; its concept is told from the same one in another model."""
    model = json.loads((path.parent / "result.json").read_text("utf-8"))["model"]
    table = pd.read_csv(path)
    return table if model == "mini" else table.assign(concept=table["concept"] + f" in {model}")


def edited(slug: str) -> None:
    """`edit.png`: the pictures before and after, as the edit's notebook shows them."""
    book = json.loads((SOURCE / slug / "notebook.ipynb").read_text("utf-8"))
    shown = [
        output
        for cell in book["cells"]
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    first = next(o for o in shown if o["metadata"]["image/png"]["alt"].startswith("Before (above)"))
    (TARGET / "edit.png").write_bytes(base64.b64decode(first["data"]["image/png"]))
    print(json.loads((SOURCE / slug / "result.json").read_text("utf-8"))["finding"])


def main() -> None:
    slugs = sys.argv[1:] or ["neon"]
    pages(slugs)
    figures(slugs)
    for slug in [slug for slug in slugs if slug.startswith("edit-")][:1]:
        edited(slug)
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{TARGET}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        sys.exit(f"larger than {LIMIT / 1e6:.0f} MB: give fewer slugs")


if __name__ == "__main__":
    main()
