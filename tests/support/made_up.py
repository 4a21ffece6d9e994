"""Results as runs leave them, made up: for the tests of the pages and their benchmark."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat.v4 as nb
import numpy as np
import pandas as pd
from PIL import Image

EVIL = "<script>alert(1)</script>"
# HTML that runs or loads something in a browser; each tries it in another way.
ATTACKS = (
    EVIL,
    "<svg><script>alert(1)</script></svg>",
    "<svg onload=alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s></svg>",
    "<svg><use href='//outside.example/x.svg#a'></use></svg>",
    "<img src=x onerror=alert(1)>",
    "<img src='data:,' srcset='//outside.example/x.png 2x' alt='x'>",
    "<body onload=alert(1)>",
    "<details open ontoggle=alert(1)>x</details>",
    "<b autofocus tabindex=0 onfocus=alert(1)>x</b>",
    "<audio src=x onerror=alert(1)></audio>",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href='&#x6A;ava&Tab;script:alert(1)'>x</a>",
    "<a href=' \x01javascript:alert(1)'>x</a>",
    "<a href='vbscript:msgbox(1)'>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<a href='DATA:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg=='>x</a>",
    "<iframe src='javascript:alert(1)'></iframe>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<object data='data:text/html,<script>alert(1)</script>'></object>",
    "<embed src='//outside.example/x.swf'>",
    "<meta http-equiv=refresh content='0;url=//outside.example'>",
    "<base href='//outside.example/'>",
    "<link rel=stylesheet href='//outside.example/x.css'>",
    "<form action='//outside.example'><input type=image src='//outside.example/x.png'></form>",
    "<form><button formaction='javascript:alert(1)'>x</button></form>",
    "<isindex action='javascript:alert(1)' type=image>",
    "<style>@import url(//outside.example/x.css);</style>",
    "<div style='background: url(//outside.example/x.png)'>x</div>",
    "<div style='width: url(//outside.example/x.png)'>x</div>",
    "<div style='width: expression(alert(1)); -moz-binding: url(//outside.example/x)'>x</div>",
    "<table background='//outside.example/x.png'><tr><td>x</table>",
    # Mutation: harmless for one parser, and something else when a browser reads the result again.
    "<svg></p><style><a id='</style><img src=1 onerror=alert(1)>'>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<form><math><mtext></form><form><mglyph><style></math><img src=x onerror=alert(1)>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'></noscript>",
    "<textarea><p title='</textarea><img src=x onerror=alert(1)>'></textarea>",
    "<template><p title='</template><img src=x onerror=alert(1)>'></template>",
    "<xmp><p title='</xmp><img src=x onerror=alert(1)>'></xmp>",
    "<!--><img src=x onerror=alert(1)>-->",
    "<![CDATA[><img src=x onerror=alert(1)>]]>",
    "<p title='`'><img src=x alt='`onerror=alert(1)'>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<img title='</title><script>alert(1)</script>' src=x onerror\x00=alert(1)>",
)
ALT = "van gogh: the window of layers 1-2 lowers the CLIP-score by 0.34"


def png(color: str = "red", size: tuple[int, int] = (800, 30), mode: str = "RGBA") -> str:
    Image.new(mode, size, color).save(data := io.BytesIO(), "PNG")
    return base64.b64encode(data.getvalue()).decode()


def effects(concept: str, start: int = 1, kind: str = "style", scale: float = 1) -> pd.DataFrame:
    known = dict(method="locogen", concept=concept, kind=kind, width=2, n=12)
    height = 0.34 * scale
    rows = [
        dict(known, axis="layer", position=w, estimate=height if w == start else 0.01 * w)
        for w in range(6)
    ]
    rows.append(dict(known, axis="ceiling", position=pd.NA, estimate=0.4 * scale))
    table = pd.DataFrame(rows).astype({"position": "Int64"})
    return table.assign(low=table["estimate"] - 0.06, high=table["estimate"] + 0.06)


def notebook(concept: str, alt: str | None = ALT) -> Any:
    metadata = {"image/png": {"alt": alt}} if alt else {}
    figure = nb.new_output(
        "display_data", data={"image/png": png(), "text/plain": "<Figure>"}, metadata=metadata
    )
    widget = {
        "application/vnd.jupyter.widget-view+json": {"model_id": "1"},
        "text/plain": "IntSlider()",
    }
    outputs = [
        nb.new_output("stream", name="stderr", text="SECRET progress 10 %\n"),
        nb.new_output("stream", name="stdout", text="1/9\r5/9\r9/9 pictures\n<b>plain</b>\n"),
        nb.new_output(
            "display_data", data={"text/html": f"<table><tr><td>{concept}</td></tr></table>"}
        ),
        nb.new_output(
            "display_data",
            data={"text/markdown": f"**{concept}** ![x](https://evil.example/x.png)"},
        ),
        nb.new_output(
            "display_data", data={"application/javascript": "alert(2)", "text/plain": "js"}
        ),
        nb.new_output("display_data", data=widget),
        figure,
    ]
    cells = [
        nb.new_markdown_cell(
            f"# Where is {concept}?\n\n[paper](https://arxiv.org/abs/2405.01008), [csv](pictures.csv)"
        ),
        nb.new_code_cell("run = loco.localize(pipe, concept)", outputs=outputs),
        nb.new_markdown_cell("an unclosed <script> and <!-- comment"),
        nb.new_markdown_cell("The last words."),
    ]
    return nb.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


def finish(
    folder: Path, concept: str, *, start: int | None = 1, alt: str | None = ALT, **more: Any
) -> Path:
    """A finished run, as `study` leaves it."""
    folder.mkdir(parents=True)
    nbformat_write(notebook(concept, alt), folder)
    effects(concept, kind=more.get("kind", "style")).to_csv(folder / "effects.csv", index=False)
    pd.DataFrame({"concept": [concept], "clip_score": [0.5]}).to_csv(
        folder / "pictures.csv", index=False
    )
    carrier = dict(
        concept=concept, start=start, width=2, reason="ahead" if start is not None else "no effect"
    )
    result = dict(
        title=f"{concept} in mini", notebook="localize", model="mini", concepts=[concept], kind="style",
        finding=f"{concept}: found", carriers=[carrier], settings={"window": 2, "seeds": [0, 1]},
        versions={"torch": "2.13.0"}, parameters={"concept": concept}, pictures=384, seconds=131.0,
        finished="2025-01-02T03:04:05Z",
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps({**result, **more}), encoding="utf-8")
    return folder


def nbformat_write(book: Any, folder: Path) -> None:
    (folder / "notebook.ipynb").write_text(json.dumps(book), encoding="utf-8")


def pictures(concept: str) -> pd.DataFrame:
    """The head of a pictures table: what one prompt and two seeds have made."""
    known = dict(concept=concept, prompt=f"a house in {concept}", edit="", clip_score=0.5)
    places = [("baseline", pd.NA), *(("window", at) for at in range(6)), ("ceiling", pd.NA)]
    rows = [
        dict(known, role=role, start=at, width=2 if role == "window" else pd.NA, seed=seed)
        for seed in (0, 1)
        for role, at in places
    ]
    images = [
        f"{row['seed']}-{row['role']}-{row['start']}.png".replace("-<NA>", "") for row in rows
    ]
    return pd.DataFrame(rows).assign(image=images)


def swept(concept: str) -> pd.DataFrame:
    """A whole pictures table: what `pictures` has, the inserts and a score that falls at window 1."""
    rows = pictures(concept)
    inserts = rows[rows["role"] == "window"].assign(role="insert")
    table = pd.concat([rows, inserts], ignore_index=True).assign(target="a house")
    lost = (table["role"] == "ceiling") | ((table["role"] == "window") & (table["start"] == 1))
    return table.assign(clip_score=np.where(lost, 0.16, 0.5))


def edited(arms: Sequence[str]) -> pd.DataFrame:
    """An evaluation of edits, whose pictures are those of `fill_store`: baseline before, ceiling after."""
    known = dict(unit="", text="x", right_before=1.0, right_after=0.0, before=0.5, after=0.1)
    rows = [
        dict(known, arm=arm, measure=measure, prompt=f"{EVIL} {measure}", seed=seed, image_before=f"{seed}-baseline.png")
        for arm in arms
        for measure in ("efficacy", "specificity")
        for seed in (0, 1)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(
        image_after=[
            name if arm == "no edit" else name.replace("baseline", "ceiling")
            for arm, name in zip(table["arm"], table["image_before"], strict=True)
        ]
    )


def fill_store(folder: Path, size: int = 64) -> None:
    """Pictures of noise, the hardest to make small, under the names that `pictures` gives."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for name in sorted(set(pictures("x")["image"])):
        Image.fromarray(noise.integers(0, 256, (size, size, 3), dtype="uint8")).save(folder / name)


def fail(folder: Path, concept: str, error: str, **more: Any) -> Path:
    """A run that failed in its fifth cell, as `study` leaves it."""
    folder.mkdir(parents=True)
    cells = [nb.new_code_cell(f"step({n})", execution_count=n) for n in range(1, 6)]
    cells[-1].outputs = [
        nb.new_output("error", ename="LocogenError", evalue=error, traceback=[error])
    ]
    nbformat_write(nb.new_notebook(cells=cells), folder)
    told = dict(
        title=concept,
        notebook="localize",
        model="mini",
        concepts=[concept],
        kind="",
        finding="",
        carriers=[],
    )
    told |= dict(
        settings={}, pictures=0, versions={"torch": "2.13.0"}, seconds=2.0, error=error, cell=5
    )
    (folder / "error.json").write_text(json.dumps({**told, **more}), encoding="utf-8")
    return folder


def study(folder: Path, models: Sequence[str], concepts: Sequence[str]) -> Path:
    """A run of every concept in every model, pictures included; what carries it moves from one to the next."""
    fill_store(folder / "store")
    kinds = ("style", "object", "fact")
    for number, (model, concept) in enumerate((m, c) for m in models for c in concepts):
        place = (number * 5 + number // 7) % 6
        slug = f"{model}-{number}"
        parameters = {"model": model, "concept": f"mini/{concept}", "seeds": 2}
        more = dict(title=concept, model=model, kind=kinds[number % 3], parameters=parameters)
        finish(folder / slug, concept, start=place if number % 9 != 4 else None, **more)
        effects(concept, place, more["kind"], scale=1 + number % 4).to_csv(
            folder / slug / "effects.csv", index=False
        )
        pictures(concept).to_csv(folder / slug / "pictures.csv", index=False)
    slugs = [
        f"{model}-{number}"
        for number, (model, _) in enumerate((m, c) for m in models for c in concepts)
    ]
    (folder / "study.json").write_text(
        json.dumps({"title": "A study", "runs": slugs}), encoding="utf-8"
    )
    return folder
