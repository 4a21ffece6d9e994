"""The notebooks: source without outputs, parameters that explain themselves, short cells, and that they run.

The last tests need the mini model's weights; they execute the notebook as a study does, and by hand.
"""

import ast
import inspect
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import yaml
from markupsafe import escape
from support import tiny

import locogen
from locogen.pages.build import build
from locogen.studies.notebooks import parameters_of
from locogen.studies.study import read_study, run_study

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOCALIZE = ROOT / "notebooks" / "localize.ipynb"
CONFIG = ROOT / ".pre-commit-config.yaml"
CELL_LINES = 20
DEF_LINES = 5
TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def cells(path: Path, kind: str = "code") -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def python(source: str) -> ast.Module:
    """The cell's syntax tree, IPython's magics left out."""
    return ast.parse(re.sub(r"^%.*$", "", source, flags=re.MULTILINE))


def complaints(book: Any) -> list[str]:
    """What a notebook's source has that it should not have."""
    found: list[str] = []
    kinds = [cell.cell_type for cell in book.cells]
    found += [
        f"{name} in its metadata" for name in ("widgets", "papermill") if name in book.metadata
    ]
    if kinds[0] != "markdown" or not book.cells[0].source.startswith("# "):
        found.append("it does not begin with a title")
    if len({cell.get("id") for cell in book.cells}) < len(kinds):
        found.append("cells without an id of their own")
    if sum("parameters" in cell.metadata.get("tags", []) for cell in book.cells) != 1:
        found.append("not one cell with the tag 'parameters'")
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        if cell.outputs or cell.execution_count is not None:
            found.append("outputs")
        if len(cell.source.splitlines()) > CELL_LINES and "parameters" not in cell.metadata.get(
            "tags", []
        ):
            found.append("a long cell")
        for node in ast.walk(python(cell.source)):
            lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and lines > DEF_LINES:
                found.append(f"{node.name} has {lines} lines")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_source(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert not complaints(book)
    assert path.read_bytes().endswith(b"}\n")


def test_the_complaints_can_be_made() -> None:
    """The twin of the test above."""
    code = nbformat.v4.new_code_cell("def f():\n" + "    pass\n" * 30, execution_count=1)
    told = complaints(nbformat.v4.new_notebook(cells=[code], metadata={"widgets": {}}))
    assert told == [
        "widgets in its metadata",
        "it does not begin with a title",
        "not one cell with the tag 'parameters'",
        "outputs",
        "a long cell",
        "f has 31 lines",
    ]


def test_what_is_committed_is_stripped(tmp_path: Path) -> None:
    """The hook that contributors have finds nothing to do in our notebooks, and does take outputs out of others."""
    (hook,) = [
        hook
        for hook in yaml.safe_load(CONFIG.read_text())["repos"][0]["hooks"]
        if hook["id"] == "nbstripout"
    ]
    _, *options = shlex.split(hook["entry"])
    strip = [sys.executable, "-m", "nbstripout", *options]
    subprocess.run([*strip, "--verify", *NOTEBOOKS], check=True)
    book = nbformat.read(LOCALIZE, as_version=4)
    ran = next(cell for cell in book.cells if cell.cell_type == "code")
    ran.execution_count, ran.outputs = 1, [nbformat.v4.new_output("stream", text="seen")]
    book.metadata["widgets"] = {"state": {}}
    nbformat.write(book, tmp_path / "ran.ipynb")
    subprocess.run([*strip, tmp_path / "ran.ipynb"], check=True)
    assert nbformat.read(tmp_path / "ran.ipynb", as_version=4) == nbformat.read(
        LOCALIZE, as_version=4
    )


def test_the_readme_lists_every_notebook() -> None:
    """With its question, its time and what comes out."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if "(notebooks/" in line
    ]
    rows = [row for row in rows if len(row) == 4]
    assert sorted(re.findall(r"\(notebooks/(\w+)\.ipynb\)", " ".join(row[0] for row in rows))) == [
        path.stem for path in NOTEBOOKS
    ]
    for _, question, duration, result in rows:
        assert (
            question.endswith("?") and re.fullmatch(r"[\d.]+ min|not measured", duration) and result
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_explain_themselves(path: Path) -> None:
    """Each has a type, a default of that type and a word of help, so that misspelt ones can be refused."""
    (cell,) = [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    found = parameters_of(path)
    assert len(found) == len(cell.source.splitlines())
    for name, told in found.items():
        assert told["help"].strip(), f"{name} is not explained"
        default = ast.literal_eval(told["default"])
        assert type(default) is TYPES[told["inferred_type_name"]], (
            f"{name} is no {told['inferred_type_name']}"
        )


def test_localize_takes_what_it_promises() -> None:
    names = set(parameters_of(LOCALIZE))
    assert {
        "model",
        "concept",
        "concepts_file",
        "prompt",
        "target",
        "text",
        "kind",
        "window",
        "seeds",
    } <= names
    assert {
        "num_inference_steps",
        "guidance_scale",
        "scorer",
        "device",
        "dtype",
        "store",
        "results",
    } <= names


@pytest.mark.parametrize("name", ["edit", "erase_many", "neurons"])
def test_states_are_chosen_by_the_model_unless_asked(name: str) -> None:
    """The same ones in every call: an edit is compared with the neurons of just these."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    # The edit's are those that do well on the shipped model; the published ones are an arm beside it.
    default = "end" if name == "edit" else ""
    assert ast.literal_eval(parameters_of(path)["tokens"]["default"]) == default
    source = "\n".join(cell.source for cell in cells(path))
    given = re.findall(r"\btokens=([^,)\n]+)", source)
    assert set(given) == {"tokens or None"}
    assert (
        name != "neurons"
        or len(given) == len(re.findall(r"loco\.(?:find_neurons|fit_edit)\(", source)) == 3
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_is_read(path: Path) -> None:
    source = "\n".join(cell.source for cell in cells(path)[1:])
    unused = [name for name in parameters_of(path) if not re.search(rf"\b{name}\b", source)]
    assert not unused, f"parameters that nobody reads: {unused}"


# An interval over fewer seeds is hardly worth printing.
ENOUGH_SEEDS = 4


def defaults_of(path: Path) -> dict[str, Any]:
    """Name → default of a notebook's parameters."""
    return {
        name: ast.literal_eval(parameter["default"])
        for name, parameter in parameters_of(path).items()
    }


def seeds_in(parameters: Mapping[str, Any]) -> int:
    """The fewest seeds of a notebook's parameters."""
    if "seeds" in parameters:
        return int(parameters["seeds"])
    # Those of the benchmark stand in its sizes: prompts x seeds, several with commas.
    return min(int(size.split("x")[1]) for size in str(parameters["sizes"]).split(","))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_take_four_seeds_by_default(path: Path) -> None:
    assert seeds_in(defaults_of(path)) >= ENOUGH_SEEDS


def test_every_study_takes_four_seeds() -> None:
    """Those in the repository, in every run."""
    few = []
    for path in sorted((ROOT / "reports").glob("*.toml")):
        for run in read_study(path)[2]:
            if seeds_in(defaults_of(run.notebook) | run.parameters) < ENOUGH_SEEDS:
                few.append(f"{path.name}: {run.slug}")
    assert not few


def test_verbs_take_four_seeds_by_default() -> None:
    """But for a fit, whose average over seeds has no interval."""
    few = []
    for name in locogen.__all__:
        verb = getattr(locogen, name)
        parameters = inspect.signature(verb).parameters if inspect.isfunction(verb) else {}
        default = parameters["seeds"].default if "seeds" in parameters else None
        if isinstance(default, range | tuple) and len(default) < ENOUGH_SEEDS:
            few.append(name)
    assert few == ["fit_steering"]


def test_few_seeds_are_seen() -> None:
    """The twin of both."""
    assert seeds_in({"seeds": 2, "sizes": "2x4"}) == 2
    assert seeds_in({"sizes": "2x4, 8x1"}) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pages_without_code_have_no_heading_over_nothing(path: Path) -> None:
    """A heading whose cell leads to parameters alone speaks to who runs the notebook: it is tagged."""
    book = nbformat.read(path, as_version=4)
    shown = [cell for cell in book.cells if "notebook" not in cell.metadata.get("tags", [])]
    for i, cell in enumerate(shown[:-1]):
        is_heading = cell.cell_type == "markdown" and len(cell.source.splitlines()) == 1
        if is_heading and cell.source.startswith("## "):
            until = [one.cell_type for one in shown[i + 1 :]].index("markdown")
            assert any(shows(one.source) for one in shown[i + 1 : i + 1 + until]), cell.source
        assert "Shift+Enter" not in cell.source and "these lines" not in cell.source


def shows(source: str) -> bool:
    """Whether a cell shows something: a figure, or the value of its last line."""
    last = python(source).body[-1]
    return "loco.show(" in source or "display(" in source or isinstance(last, ast.Expr)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_are_shown_in_one_way(path: Path) -> None:
    """With alt text, and closed: by `show`."""
    for cell in cells(path):
        assert "plt.show" not in cell.source
        if re.search(r"loco\.plot_\w+\(", cell.source):
            assert "show(" in cell.source


def test_the_sweep_of_edits_leaves_joined_layers_out() -> None:
    (source,) = (
        c["source"]
        for c in cells(ROOT / "notebooks" / "edit_sweep.ipynb")
        if "starts = " in c["source"]
    )
    names: dict[str, Any] = {"loco": locogen, "pipe": tiny.flux(), "window": 2, "step": 1}
    exec(source[: source.index("edits = {")].partition("\n")[2], names)
    assert names["starts"] == [0]


def test_every_study_is_in_order() -> None:
    """Those in the repository: parameters, concepts and models exist, and the main one is what it should be."""
    for path in sorted((ROOT / "reports").glob("*.toml")):
        read_study(path)
    title, folder, runs = read_study(ROOT / "reports" / "mini.toml")
    assert title and folder == ROOT / "reports" / "mini"
    asked = [str(run.parameters["concept"]) for run in runs if run.notebook.stem == "localize"]
    assert [run.notebook.stem for run in runs].count("edit") == 1
    from locogen.catalog import concepts

    table = concepts("mini").set_index("id").loc[asked]
    assert (table["kind"] == "style").sum() >= 3 and (table["kind"] == "object").sum() >= 1
    notes = set(table["note"].str.partition(":")[0])
    assert {"told", "untold"} <= notes


# --- executed ------------------------------------------------------------------------------------

TINY = """
notebook = "localize"
model = "mini"
[defaults]
seeds = 1
max_prompts = 1
num_inference_steps = 2
"""


def outputs(path: Path, kind: str) -> list[Any]:
    every = [output for cell in cells(path) for output in cell.outputs]
    return [output for output in every if output.output_type == kind]


def images(path: Path) -> list[Any]:
    return [o for o in outputs(path, "display_data") if "image/png" in o.data]


UNREADABLE = re.compile(r"<NA>|&lt;NA&gt;|\bNaN\b|\bnan\b|>None<|[-−]0\.0*\b(?!\d)")


def check_for_readers(path: Path) -> None:
    """Every figure has its words in HTML too, and no table says NaN, <NA> or -0.000."""
    for image in images(path):
        assert escape(image.metadata["image/png"]["alt"]) in image.data["text/html"]
    for output in outputs(path, "display_data") + outputs(path, "execute_result"):
        if "image/png" not in output.data and "-twin" not in output.data.get("text/html", ""):
            shown = output.data.get("text/html") or output.data.get("text/plain", "")
            assert not UNREADABLE.findall(shown), shown


@pytest.mark.parametrize("cell", ["NaN", "<NA>", "-0.000", "−0.00", "nan"])
def test_what_is_unreadable_is_seen(cell: str) -> None:
    """The twin: and ordinary numbers are not."""
    assert UNREADABLE.search(f"<td>{cell}</td>")
    assert not UNREADABLE.search("<td>−0.004</td> <td>0.000</td> -0.05 nano")


def check_run(folder: Path, kind: str) -> dict[str, Any]:
    """What the pages read is there and agrees with itself."""
    told = json.loads((folder / "result.json").read_text())
    pictures, effects = (pd.read_csv(folder / name) for name in ("pictures.csv", "effects.csv"))
    assert told["kind"] == kind == pictures["kind"].iloc[0]
    assert told["pictures"] == len(pictures) and told["concepts"] == list(
        pictures["concept"].unique()
    )
    assert {"baseline", "window", "insert", "ceiling", "placebo"} == set(pictures["role"])
    content = {"content", "content_ceiling", "content_placebo"}
    assert set(effects["axis"]) == {"layer", "insert", "ceiling", "placebo"} | (
        set() if kind == "fact" else content
    )
    (carrier,) = told["carriers"]
    assert set(carrier) == {"concept", "start", "width", "reason", "kind", "places"}
    assert carrier["width"] == 2
    assert told["finding"].startswith(told["concepts"][0])
    shown = images(folder / "notebook.ipynb")
    assert len(shown) == (6 if kind == "fact" else 7)
    assert all(len(image.metadata["image/png"]["alt"]) > 30 for image in shown)
    assert not outputs(folder / "notebook.ipynb", "error")
    noise = "".join(output.text for output in outputs(folder / "notebook.ipynb", "stream"))
    assert not noise, f"a page should not show: {noise}"
    kinds = {
        mime
        for output in outputs(folder / "notebook.ipynb", "display_data")
        for mime in output.data
    }
    assert kinds <= {"image/png", "text/html", "text/markdown", "text/plain"}, (
        "widgets do not survive in a page"
    )
    return told


@pytest.mark.slow  # `make demo` runs it too
def test_localize_runs(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY + '[[run]]\nconcept = "mini/neon"\n')
    folder = run_study(tmp_path / "tiny.toml")
    told = check_run(folder / "neon", "style")
    assert told["pictures"] == 33 and told["model"] == told["settings"]["model"] == "mini"
    assert str(tmp_path) not in (folder / "neon" / "notebook.ipynb").read_text()


@pytest.mark.slow
def test_localize_runs_for_every_kind_and_ones_own_prompt(tmp_path: Path) -> None:
    own = 'prompt = "a picture of a cat"\ntarget = "a picture of a dog"\ntext = "a cat"\nkind = "object"\n'
    runs = (
        f'[[run]]\nconcept = "mini/owl"\n[[run]]\nconcept = "mini/logo-of-docker"\n[[run]]\n{own}'
    )
    (tmp_path / "tiny.toml").write_text(TINY + runs)
    folder = run_study(tmp_path / "tiny.toml")
    for slug, kind in (
        ("owl", "object"),
        ("logo-of-docker", "fact"),
        ("a-picture-of-a-cat", "object"),
    ):
        check_run(folder / slug, kind)
    assert set(pd.read_csv(folder / "a-picture-of-a-cat" / "pictures.csv")["text"]) == {"a cat"}


QUICK: dict[str, dict[str, Any]] = {
    "00_start_here": dict(max_prompts=1, seeds=1),
    "localize": dict(concept="mini/neon", max_prompts=1, seeds=1),
    "edit": dict(max_prompts=2, neighbors=1, controls=1, seeds=1, attacks="closed"),
    "edit_sweep": dict(
        prompts=1, neighbors=1, step=14, seeds=1, ridges="0.01, 1", tokens="last_subject"
    ),
    "erase_many": dict(prompts=1, most=2, seeds=1),
    "neurons": dict(max_prompts=1, seeds=1, shares="5, 50", draws=1, batch_size=2),
    "causal_trace": dict(max_prompts=1, seeds=1, batch_size=8),
    "compare_localizers": dict(max_prompts=1, seeds=2, most=1, batch_size=8),
    "compare_editors": dict(
        editors="LocoEdit, AdaVD, neurons", choosing=1, max_prompts=2, neighbors=1, seeds=1
    ),
    "attribute": dict(most_points=3, seeds=1),
    "benchmark": dict(
        plants="style-nobody-a", localizers="constant, random window", sizes="1x1", concepts=1
    ),
    "steps": dict(steps="1, 2", reference=3, seeds=2, ids="mini/neon, mini/cat"),
}
LOOKED_AT = {"choosing", "evaluation"}  # tables with a row for every picture and question
OWN_STEPS = {"steps", "benchmark"}  # they have no such parameter
FIGURES = {"00_start_here": 3, "localize": 7, "neurons": 3}


def test_every_notebook_is_executed() -> None:
    assert set(QUICK) == {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_by_plain_papermill(path: Path, tmp_path: Path) -> None:
    import papermill

    out = tmp_path / "out.ipynb"
    asked = QUICK[path.stem] | ({} if path.stem in OWN_STEPS else {"num_inference_steps": 2})
    papermill.execute_notebook(str(path), str(out), asked, progress_bar=False, cwd=str(tmp_path))
    assert len(images(out)) == FIGURES.get(path.stem, len(images(out))) > 0
    check_for_readers(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"], (
        "nothing is written that was not asked for"
    )


@pytest.mark.slow
def test_start_here_runs(tmp_path: Path) -> None:
    """In a study; what can be clicked leaves its twin, and after the edit is undone the pictures are the same."""
    values = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in QUICK["00_start_here"].items()
    )
    own = f'notebook = "00_start_here"\nmodel = "mini"\n[[run]]\nname = "one"\nnum_inference_steps = 2\n{values}\n'
    (tmp_path / "tiny.toml").write_text(own)
    out = run_study(tmp_path / "tiny.toml") / "one" / "notebook.ipynb"
    assert len(images(out)) == FIGURES["00_start_here"] and not outputs(out, "error")
    (said,) = outputs(out, "stream")
    assert said.text == "pictures after undoing are the same, byte for byte\n"
    live = [
        o
        for o in outputs(out, "display_data")
        if "application/vnd.jupyter.widget-view+json" in o.data
    ]
    (twin,) = [
        o.data["text/html"]
        for o in outputs(out, "display_data")
        if "-twin" in o.data.get("text/html", "")
    ]
    assert len(live) == 1 and twin.count('src="data:image/png;base64,') == 4 and "hearing" in twin
    assert str(tmp_path) not in out.read_text()


@pytest.mark.slow
def test_a_run_that_attribution_proposed_shows_its_maps(tmp_path: Path) -> None:
    """Layers × steps and layers × words on its page, the search among its settings; a whole sweep has neither."""
    own = 'notebook = "localize"\nmodel = "mini"\nconcepts = ["mini/neon"]\n'
    own += "[defaults]\nmax_prompts = 1\nseeds = 2\nnum_inference_steps = 2\nwindow = 4\n"
    own += '[[run]]\nname = "one"\nsearch = "attribute"\n[[run]]\nname = "all"\nsearch = "all"\n'
    (tmp_path / "tiny.toml").write_text(own)
    results = run_study(tmp_path / "tiny.toml", workers=1)
    build(results)
    pages = {
        name: (results / f"{name}-neon" / "index.html").read_text(encoding="utf-8")
        for name in ("one", "all")
    }
    for by in ("step", "token"):
        words = f"what gradients propose, shares by {by} and layer"
        assert words in pages["one"] and words not in pages["all"]
    assert "proposed by attribution" in pages["one"]
    # The index has both: windows that were not looked at do not make a table a damaged one.
    index = (results / "index.html").read_text(encoding="utf-8")
    assert index.count('class="place"') == 2
    assert "<dd>attribute</dd>" in pages["one"] and "<dd>all</dd>" in pages["all"]
    told = json.loads((results / "one-neon" / "result.json").read_text())
    assert told["pictures"] == told["settings"]["generations"]
    assert told["pictures"] > len(pd.read_csv(results / "one-neon" / "pictures.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edit", "edit_sweep", "erase_many", "compare_editors"])
def test_editing_notebooks_run(tmp_path: Path, name: str) -> None:
    values = "\n".join(f"{key} = {json.dumps(value)}" for key, value in QUICK[name].items())
    own = f'notebook = "{name}"\nmodel = "mini"\n[[run]]\nname = "one"\nnum_inference_steps = 2\n{values}\n'
    (tmp_path / "tiny.toml").write_text(own)
    folder = run_study(tmp_path / "tiny.toml") / "one"
    result = json.loads((folder / "result.json").read_text())
    tables = [pd.read_csv(path) for path in folder.glob("*.csv") if path.stem in LOOKED_AT]
    assert result["finding"]
    every = pd.concat(tables)
    # Rows of one prompt share its pictures, and "before" is the same in all arms.
    made = {*every["image_before"].dropna(), *every["image_after"].dropna()}
    attacked = every[every["image_after"].isna()]
    if name == "edit_sweep":  # those that chose are in no table
        assert result["pictures"] > len(made)
    else:
        assert result["pictures"] == len(made) + len(attacked)
    if name == "edit":
        assert {"name", "short", "long", "rest", "closed"} < set(every["measure"])
        assert {"placebo", "no edit", "a concept it never had"} < set(attacked["arm"])
    shown = images(folder / "notebook.ipynb")
    assert shown and all(len(image.metadata["image/png"]["alt"]) > 30 for image in shown)
    assert not outputs(folder / "notebook.ipynb", "error")
    assert str(tmp_path) not in (folder / "notebook.ipynb").read_text()
    if name == "edit":
        from locogen.editing.edit import Edit

        assert Edit.load(folder / "edit.safetensors").layers == (12, 13)
        assert "the same, byte for byte" in (folder / "notebook.ipynb").read_text()


@pytest.mark.slow
def test_steps_runs(tmp_path: Path) -> None:
    asked = "".join(f"{key} = {json.dumps(value)}\n" for key, value in QUICK["steps"].items())
    (tmp_path / "tiny.toml").write_text(
        f'notebook = "steps"\nmodel = "mini"\n[[run]]\nname = "one"\n{asked}'
    )
    folder = run_study(tmp_path / "tiny.toml") / "one"
    agreed = pd.read_csv(folder / "agreement.csv")
    assert list(agreed["steps"].unique()) == ["1", "2", "3, other seeds"] and set(
        agreed["concept"]
    ) == {"neon", "cat"}
    assert (agreed["reached"] <= 1).all() and agreed["rank"].abs().max() <= 1
    told = json.loads((folder / "result.json").read_text())
    assert told["pictures"] == 3 * 2 * 2 * 16 and "90 % of what" in told["finding"]
    assert (
        not outputs(folder / "notebook.ipynb", "error")
        and len(images(folder / "notebook.ipynb")) == 1
    )


@pytest.mark.slow
def test_neurons_runs(tmp_path: Path) -> None:
    asked = 'shares = "5, 50"\ndraws = 1\nbatch_size = 2\n[[run]]\nconcept = "mini/neon"\n'
    tiny = TINY.replace('"localize"', '"neurons"').replace("seeds = 1", "seeds = 2")
    (tmp_path / "tiny.toml").write_text(tiny + asked)
    folder = run_study(tmp_path / "tiny.toml") / "neon"
    out = folder / "notebook.ipynb"
    assert len(images(out)) == 3
    assert all(len(image.metadata["image/png"]["alt"]) > 30 for image in images(out))
    assert not outputs(out, "error")
    assert not outputs(out, "stream"), "a page should show no noise"
    changes, pictures = (pd.read_csv(folder / name) for name in ("changes.csv", "pictures.csv"))
    assert set(changes["arm"]) == {"nothing", "top", "random", "edit"}
    assert (changes[changes["arm"] == "nothing"]["estimate"] == 0).all()
    assert pictures["image"].nunique() == len(pictures) == 6 * 2, "each arm has pictures of its own"
    assert json.loads((folder / "result.json").read_text())["concepts"] == ["neon"]
    assert len(pd.read_csv(folder / "neurons.csv")) == 2 * (96 + 64)  # K and V of layers 12 and 13


@pytest.mark.slow
def test_localizers_notebooks_run(tmp_path: Path) -> None:
    tiny = TINY.replace('"localize"', '"compare_localizers"')
    asked = '[[run]]\nname = "both"\nids = "mini/neon, mini/logo-of-docker"\n'
    asked += '[[run]]\nnotebook = "causal_trace"\nconcept = "mini/logo-of-docker"\n'
    (tmp_path / "tiny.toml").write_text(tiny.replace("seeds = 1", "seeds = 2") + asked)
    folder = run_study(tmp_path / "tiny.toml")
    for slug, tables in (
        ("both", ("localizers", "agreement", "sides", "trace")),
        ("logo-of-docker", ("trace",)),
    ):
        out = folder / slug / "notebook.ipynb"
        assert images(out) and all(
            len(image.metadata["image/png"]["alt"]) > 30 for image in images(out)
        )
        assert not outputs(out, "error") and not outputs(out, "stream")
        assert all(len(pd.read_csv(folder / slug / f"{name}.csv")) for name in tables)
        assert json.loads((folder / slug / "result.json").read_text())["finding"]
    answers, pairs = (
        pd.read_csv(folder / "both" / f"{name}.csv") for name in ("localizers", "agreement")
    )
    localizers = 4
    assert len(answers) == 2 * localizers
    assert len(pairs) == 2 * math.comb(localizers, 2)
    pictures = pd.read_csv(folder / "logo-of-docker" / "pictures.csv")
    assert set(pictures["text"].str.contains("a whale")) == {True}, "a fact is scored by its answer"


def test_the_localizers_study_asks_about_every_concept() -> None:
    runs = read_study(ROOT / "reports" / "localizers.toml")[2]
    compared = [run.parameters for run in runs if run.notebook.stem == "compare_localizers"]
    assert {values["kind"] for values in compared} == {"style", "object", "fact"}
    assert all(values["most"] == 0 for values in compared)
    assert sum(run.notebook.stem == "causal_trace" for run in runs) >= 2
