"""What a study file asks for: products of lists, exclusions, defaults, names that stay, and what it will cost."""

import ast
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import papermill
import pytest
from test_study import write_notebook

from locogen.errors import LocogenError
from locogen.plan import Concept, PromptPair, sweep
from locogen.studies.estimates import Costs, duration
from locogen.studies.notebooks import NAMES, check_parameters, parameters_of
from locogen.studies.planning import Planned, read_study
from locogen.studies.study import run_study

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def plan(tmp_path: Path) -> Callable[[str], list[Planned]]:
    """The runs of a study written as text, beside a model and two notebooks, of which kinds.ipynb has no concept."""
    (tmp_path / "own").mkdir()
    write_notebook(tmp_path / "small.ipynb")
    write_notebook(
        tmp_path / "kinds.ipynb",
        parameters='model: str = "mini"  # a model\nkind: str = "style"  # of what',
    )

    def plan(text: str) -> list[Planned]:
        (tmp_path / "study.toml").write_text(text, encoding="utf-8")
        return list(read_study(tmp_path / "study.toml")[2])

    return plan


MATRIX = """
notebook = "small.ipynb"
models = ["mini", "./own"]
concepts = ["mini/neon", "mini/owl"]
[grid]
seeds = [1, 2]
scale = [0.5]
[defaults]
fast = true
"""


def test_runs_are_the_product_of_the_lists(plan) -> None:
    runs = plan(MATRIX)
    told = [
        (run.parameters["model"], run.parameters["concept"], run.parameters["seeds"])
        for run in runs
    ]
    assert told == [
        (m, c, s) for m in ("mini", "./own") for c in ("mini/neon", "mini/owl") for s in (1, 2)
    ]
    assert all(run.parameters["scale"] == 0.5 and run.parameters["fast"] is True for run in runs)
    assert [run.slug for run in runs][::3] == ["mini-neon-seeds-1-scale-0-5", "mini-owl-seeds-2-scale-0-5", *[
        "own-mini-owl-seeds-1-scale-0-5"
    ]]  # fmt: skip
    assert runs[0].title == "neon, mini, seeds 1, scale 0.5" and runs[0].subject == "neon"
    assert len({run.key for run in runs}) == len({run.slug for run in runs}) == 8


def test_a_list_that_grows_renames_nothing(plan) -> None:
    """So that a model more costs the runs of that model, and no other."""
    before = {
        run.slug: run.key
        for run in plan(MATRIX.replace('"mini", "./own"', '"mini"').replace("[1, 2]", "[2]"))
    }
    after = {run.slug: run.key for run in plan(MATRIX)}
    assert len(before) == 2 and before.items() < after.items()


def test_exclusions_leave_out_what_has_all_of_it(plan) -> None:
    runs = plan(
        MATRIX
        + '[[exclude]]\nmodel = "./own"\nseeds = 2\n[[exclude]]\nconcept = ["mini/owl", "mini/cat"]\n'
    )
    left = [
        (run.parameters["model"], run.parameters["concept"], run.parameters["seeds"])
        for run in runs
    ]
    assert left == [("mini", "mini/neon", 1), ("mini", "mini/neon", 2), ("./own", "mini/neon", 1)]


def test_exclusions_know_defaults_of_the_notebook(plan) -> None:
    runs = plan(
        MATRIX.replace("seeds = [1, 2]", 'store = ["", "x"]')
        + "[[exclude]]\nseeds = 4\nstore = 'x'\n"
    )
    assert [run.parameters["store"] for run in runs] == [""] * 4


def test_each_notebook_takes_the_lists_that_it_knows(plan) -> None:
    """One without a concept is run once a model, not once a concept."""
    runs = plan(
        MATRIX.replace('notebook = "small.ipynb"', 'notebooks = ["small.ipynb", "kinds.ipynb"]')
    )
    assert [run.slug for run in runs if run.notebook.stem == "kinds"] == [
        "kinds-mini-run",
        "kinds-own-run",
    ]
    assert runs[-1].parameters == {"model": "./own"} and len(runs) == 10
    assert runs[0].slug.startswith("small-mini-neon")


def test_run_tables_take_from_the_top_what_they_do_not_say(plan) -> None:
    runs = plan(
        'notebook = "small.ipynb"\nmodels = ["mini", "./own"]\n[defaults]\nseeds = 3\n'
        '[[run]]\nconcepts = ["mini/neon", "mini/owl"]\n'
        '[[run]]\nname = "wide"\nconcept = "mini/owl"\nmodel = "mini"\nseeds = 9\ngrid.scale = [1, 2]\n'
    )
    assert [run.slug for run in runs] == [
        "mini-neon", "mini-owl", "own-mini-neon", "own-mini-owl", "wide-scale-1", "wide-scale-2"
    ]  # fmt: skip
    assert runs[0].parameters["seeds"] == 3 and runs[4].parameters == {
        "model": "mini", "concept": "mini/owl", "seeds": 9, "scale": 1
    }  # fmt: skip


BAD = {
    "list that is none": ('models = "mini"', r"models is 'mini': give a list"),
    "empty list": ("concepts = []", r"concepts is \[\]: give a list"),
    "value twice": ("[grid]\nseeds = [1, 1]", "seeds has a value twice"),
    "both": ('model = "mini"\nmodels = ["mini"]', "both model and models"),
    "grid that is none": ("grid = 3", "grid is not a table"),
    "results that are no folder": (
        'results = 3\nconcepts = ["mini/neon"]',
        'results is 3: give .* results = "out"',
    ),
    "misspelt grid": ("[grid]\nsedes = [1]", "no parameter 'sedes': did you mean 'seeds'"),
    "grid of another type": (
        '[grid]\nseeds = [1, "2"]',
        "run 1: seeds is '2': small.ipynb takes a value of type int",
    ),
    "unknown model in a list": (
        'models = ["mini", "minni"]',
        "no model 'minni': did you mean 'mini'",
    ),
    "folder that is not there": (
        'models = ["./none"]',
        "there is no folder .*none to load a model from",
    ),
    "unknown concept in a list": (
        'concepts = ["mini/nen"]',
        "no concept 'mini/nen': did you mean 'mini/neon'",
    ),
    "list for a notebook without": (
        'notebook = "kinds.ipynb"\nconcepts = ["mini/neon"]',
        "no parameter 'concept'",
    ),
    "exclusion of nothing": (
        'concepts = ["mini/neon"]\n[[exclude]]\nseeds = 77',
        "exclude 1: it leaves nothing out",
    ),
    "empty exclusion": (
        'concepts = ["mini/neon"]\n[[exclude]]',
        "exclude 1: it leaves nothing out",
    ),
    "misspelt exclusion": (
        'concepts = ["mini/neon"]\n[[exclude]]\nsedes = 4',
        "exclude 1: no key 'sedes'",
    ),
    "exclusion of all": (
        'concepts = ["mini/neon"]\n[[exclude]]\nseeds = 4',
        "exclusions leave out all 1",
    ),
    "arranged": (
        'concepts = ["mini/neon"]\n[grid]\nresults = ["x"]',
        "results is set by the study itself",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_told(plan, tmp_path: Path, name: str) -> None:
    text, words = BAD[name]
    with pytest.raises(LocogenError, match=words) as caught:
        plan(text if "notebook" in text else f'notebook = "small.ipynb"\n{text}')
    assert str(tmp_path / "study.toml") in str(caught.value)


NASTY = [
    "../x",
    "a/b",
    "a b",
    "A/B",
    "<script>",
    "x" * 300,
    "x" * 301,
    "ж" * 300,
    "日本",
    "...",
    "con",
]


def test_names_of_any_kind_stay_in_the_folder(plan, tmp_path: Path) -> None:
    """Those that look alike as folders are told apart, the same way every time."""
    lines = [f"[[run]]\nname = {json.dumps(name)}\nseeds = {n}" for n, name in enumerate(NASTY, 1)]
    runs = plan('notebook = "small.ipynb"\n' + "\n".join(lines))
    assert len({run.slug for run in runs}) == len(NASTY)
    for run in runs:
        assert (
            run.folder.parent == tmp_path / "study"
            and run.folder.resolve().parent == tmp_path / "study"
        )
        assert not re.search(r'[\s/\\:*?"<>|.{}]', run.slug) and len(run.slug.encode()) <= 130
    again = plan('notebook = "small.ipynb"\n' + "\n".join(lines))
    assert [run.slug for run in again] == [run.slug for run in runs]


def test_concepts_that_slug_alike(plan, tmp_path: Path) -> None:
    one = 'name = "x"\nkind = "style"\nprompt = "a"\ntarget = "b"\n'
    (tmp_path / "own.toml").write_text(f'["my/x y"]\n{one}["my/x-y"]\n{one}')
    first, second = plan(
        'notebook = "small.ipynb"\nconcepts = ["my/x y", "my/x-y"]\n[defaults]\nconcepts_file = "own.toml"\n'
    )
    assert first.slug == "my-x-y" and re.fullmatch(r"my-x-y-[0-9a-f]{6}", second.slug)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_parameters_are_read_as_papermill_reads_them(path: Path) -> None:
    """Ours is the faster reader, papermill's the one that counts."""
    theirs = papermill.inspect_notebook(str(path))
    ours = parameters_of(path)
    assert list(ours) == list(theirs)
    for name, told in theirs.items():
        for field in ("name", "inferred_type_name", "default", "help"):
            assert ours[name][field] == told[field], (name, field)


def test_parameters_of_all_kinds(tmp_path: Path) -> None:
    source = 'a = 1\nb: list = [\n    1,\n]  # two # lines\nc: "str" = "x # y"\nd: int\nimport os'
    told = parameters_of(write_notebook(tmp_path / "n.ipynb", parameters=source))
    assert list(told) == ["a", "b", "c"], "no value, no parameter"
    assert told["a"]["inferred_type_name"] == "None" and told["b"]["help"] == "two # lines"
    assert told["c"]["default"] == '"x # y"' and told["c"]["help"] == ""
    with pytest.raises(LocogenError, match="not plain Python"):
        parameters_of(write_notebook(tmp_path / "m.ipynb", parameters="!ls\nx ="))


# --- what it will cost ---------------------------------------------------------------------------


def study(tmp_path: Path, text: str) -> tuple[Path, list[Planned]]:
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path, list(read_study(path)[2])


SWEEPS = 'model = "mini"\nconcepts = ["mini/neon", "mini/owl"]\n[defaults]\nseeds = 3\nwindow = 4\nmax_prompts = 2\n'


def finish(run: Planned, seconds: float, made: int, **more: Any) -> None:
    """A result as a run leaves it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    told = {
        "key": run.key,
        "notebook": run.notebook.stem,
        "model": "mini",
        "parameters": dict(run.parameters),
    }
    told |= {"seconds": seconds, "made": made, "pictures": made, **more}
    (run.folder / "result.json").write_text(json.dumps(told))


def test_pictures_of_a_sweep_are_counted(tmp_path: Path) -> None:
    import locogen as loco

    _, runs = study(tmp_path, SWEEPS)
    pairs = loco.concept("mini/neon").pairs[:2]
    rows = sweep(loco.Concept("neon", "style", pairs), n_layers=16, window=4, seeds=range(3))
    assert [Costs(tmp_path).pictures(run) for run in runs] == [len(rows)] * 2


@pytest.mark.parametrize(
    "own", ["", 'seeds: str = "2"  # x', "seeds: int = 0  # none", "seeds: int = 2  # no concept"]
)
def test_a_notebook_of_that_name_may_be_another(tmp_path: Path, own: str) -> None:
    concept = "" if "no concept" in own else 'concept: str = "mini/neon"  # an id\n'
    write_notebook(
        tmp_path / "localize.ipynb", parameters=f'model: str = "mini"  # a model\n{concept}{own}'
    )
    _, (run,) = study(tmp_path, '[[run]]\nnotebook = "./localize.ipynb"\nname = "x"\n')
    assert run.notebook.parent == tmp_path
    assert Costs(tmp_path).pictures(run) is None


def test_seconds_come_from_the_runs_so_far(tmp_path: Path) -> None:
    path, (neon, owl) = study(tmp_path, SWEEPS)
    assert Costs(path.with_suffix("")).seconds(owl) is None
    finish(neon, seconds=50.0, made=100)
    costs = Costs(path.with_suffix(""))
    count = costs.pictures(owl)
    assert count and costs.seconds(owl) == pytest.approx(count / 2)
    assert costs.left([owl, owl, owl], 2) == pytest.approx(1.5 * count / 2)
    assert costs.left([owl], 2) == pytest.approx(count / 2), (
        "one run is not faster for a second worker"
    )
    assert costs.left([], 2) == 0


def test_pictures_that_were_there_say_nothing_about_time(tmp_path: Path) -> None:
    path, (neon, owl) = study(tmp_path, SWEEPS)
    finish(neon, seconds=3.0, made=0, pictures=100)
    assert Costs(path.with_suffix("")).seconds(owl) is None


def test_other_notebooks_cost_what_they_did(tmp_path: Path) -> None:
    text = SWEEPS.replace('model = "mini"', 'model = "mini"\nnotebook = "edit"').replace(
        "window = 4\n", ""
    )
    path, (neon, owl) = study(tmp_path, text)
    assert Costs(path.with_suffix("")).pictures(owl) is None
    finish(neon, seconds=20.0, made=40)
    costs = Costs(path.with_suffix(""))
    assert costs.pictures(owl) == 40 and costs.seconds(owl) == pytest.approx(20)


def test_the_plan_says_all_of_it(tmp_path: Path, capsys) -> None:
    path, (neon, owl) = study(tmp_path, SWEEPS)
    run_study(path, dry_run=True)
    fresh = capsys.readouterr().out
    assert "no run like these has been timed yet" in fresh and "the store holds 0" in fresh
    assert not path.with_suffix("").exists()
    finish(neon, seconds=20.0, made=174)
    (neon.folder.parent / "store").mkdir()
    (neon.folder.parent / "store" / "a.png").write_bytes(b"")
    run_study(path, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("study: 2 runs, 1 to do") and lines[1] == "  neon  done"
    assert lines[2] == "  owl   new  174 pictures, about 20 s"
    assert lines[3] == "to make: 174 pictures; the store holds 1; about 20 s in one worker"
    assert owl.state == "new"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 89, 150, 7500)] == ["0 s", "89 s", "2 min", "2 h 05 min"]


def test_a_search_by_attribution_needs_far_fewer_pictures(tmp_path: Path) -> None:
    """Counted about, before any run is finished; a race depends on what it sees, and is not."""
    counts = {}
    for search in ("all", "attribute", "race"):
        path = tmp_path / f"{search}.toml"
        path.write_text(
            'notebook = "localize"\nmodel = "mini"\nconcepts = ["mini/neon"]\n'
            f'[defaults]\nseeds = 4\nmax_prompts = 6\nsearch = "{search}"\n'
        )
        [run] = read_study(path)[2]
        counts[search] = Costs(tmp_path).pictures(run)
    assert counts["race"] is None
    pairs = counts["all"] // 33
    assert counts["attribute"] == 6 * pairs + min(pairs, 15) < counts["all"] / 3


# Locogen's own notebooks: what a kernel would refuse is refused before one starts


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seeds = 0", "seeds is 0: give a whole number from 1 up"),
        ("num_inference_steps = -1", "from 0 up"),
        ('dtype = "float"', "dtype is 'float': use one of 'float32'"),
        ('device = "gpu"', "device is 'gpu': use 'cpu'"),
        ('offload = "disk"', "offload is 'disk'"),
        ('search = "fast"', "search is 'fast': use one of 'all', 'race', 'attribute'"),
        ("guidance_scale = nan", "guidance_scale is nan"),
        ("window = 17", "window is 17: mini has 16 layers"),
        ('notebook = "edit"\nlayers = "15-16"', "layers '15-16': mini has layers 0 to 15"),
        ('notebook = "edit"\nlayers = "last"', "last"),
        ('notebook = "edit"\ntokens = "first"', "tokens is 'first': use one of 'last_subject'"),
        ('notebook = "edit"\nridge = -0.1', "ridge is -0.1: give a finite number above 0"),
        ('notebook = "edit"\ntokens = "end, all"', "tokens is 'end, all': here it is one of"),
        ('notebook = "edit"\nattacks = "closd"', "attacks is 'closd': no name 'closd': did you"),
        ('notebook = "edit"\nscorer = "clip-b"', "no scorer 'clip-b'"),
        ('notebook = "edit_sweep"\nridges = "0.1, x"', "ridges is '0.1, x': write numbers above 0"),
        ('notebook = "edit_sweep"\nridges = ""', "ridges is '': write numbers above 0"),
        ('notebook = "edit_sweep"\nridges = "1, -1"', "ridges is '1, -1': write numbers above"),
        ('notebook = "edit_sweep"\nridges = "nan"', "ridges is 'nan': write numbers above 0"),
        ('notebook = "edit_sweep"\nridges = "inf"', "ridges is 'inf': write numbers above 0"),
        ('notebook = "edit_sweep"\ntokens = ""', "tokens is '': use one of 'last_subject'"),
        (
            'notebook = "neurons"\nshares = "5, 150"',
            "shares is '5, 150': write numbers above 0 and",
        ),
        ('notebook = "neurons"\nother = "mini/own"', "other is 'mini/own': no concept 'mini/own'"),
    ],
)
def test_values_are_checked_before_a_kernel_starts(plan, line: str, words: str) -> None:
    ordinary = 'concept = "mini/neon"\n'
    if "notebook" not in line:
        ordinary += 'notebook = "localize"\n'
    assert plan(f"[[run]]\n{ordinary}{line.partition(chr(10))[0] if 'notebook' in line else ''}\n")
    with pytest.raises(LocogenError, match=re.escape(words)):
        plan(f"[[run]]\n{ordinary}{line}\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('notebook = "steps"\nsteps = "4, 8.5"', "steps is '4, 8.5': write whole numbers above 0"),
        ('notebook = "steps"\nenough = 0.0', "enough is 0.0: give a share above 0 and up to 1"),
        ('notebook = "steps"\nids = "mini/neon, x"', "ids is 'mini/neon, x': no concept 'x'"),
        ('notebook = "steps"\nids = "mini/neon,"', "ids is 'mini/neon,': no concept ''"),
        ('notebook = "benchmark"\nwindows = "two"', "windows is 'two': write whole numbers"),
        ('notebook = "benchmark"\nguidance_scales = "7.5;1"', "guidance_scales is '7.5;1': write"),
        ('notebook = "benchmark"\nsizes = "2*4"', "sizes is '2*4': write prompts x seeds"),
        ('notebook = "benchmark"\nsizes = "2x0"', "sizes is '2x0': write prompts x seeds"),
        ('notebook = "benchmark"\nplants = "reports"', "plants is 'reports': no name 'reports'"),
        ('notebook = "benchmark"\nlocalizers = "const"', "localizers is 'const': no name 'const'"),
        ('notebook = "compare_editors"\neditors = "UCE, x"', "editors is 'UCE, x': no name 'x'"),
    ],
)
def test_lists_written_as_text_are_checked_too(plan, line: str, words: str) -> None:
    assert plan(f'[[run]]\nname = "x"\n{line.partition(chr(10))[0]}\n')
    with pytest.raises(LocogenError, match=re.escape(words)):
        plan(f'[[run]]\nname = "x"\n{line}\n')


def test_lists_that_notebooks_take_are_not_refused(plan) -> None:
    """The twin: names with a comma of their own, spaces, and texts that may be empty."""
    for values in (
        'notebook = "compare_editors"\neditors = "UCE, LocoEdit, preserved"\nattacks = ""',
        'notebook = "benchmark"\nsizes = "2x4, 6x6"\nwindows = "1, 2"\nplants = ""',
        'notebook = "benchmark"\nlocalizers = "locogen (attribute), constant"\nplants = "tune"',
        'notebook = "edit_sweep"\nridges = "1e-3,0.01"\ntokens = "end, all"',
        'notebook = "edit"\ntokens = ""\nscorer = "openai/clip"',
    ):
        assert plan(f'[[run]]\nname = "x"\n{values}\n')


OWN = 'prompt = "a cat in neon"\ntarget = "a cat"'


# Notebook, values that pass, values that do not, and what is said of them.
ONLY_A_KERNEL_FOUND = [
    ("attribute", 'ids = "mini/owl"', 'ids = ""', "ids is '': write ids of concepts"),
    ("steps", 'ids = "mini/owl"', 'ids = " "', "ids is ' ', spaces alone: write"),
    (
        *("compare_editors", 'ids = "mini/neon, mini/owl"', 'ids = "mini/neon, mini/neon"'),
        "ids is 'mini/neon, mini/neon': mini/neon is there twice",
    ),
    (
        *("compare_localizers", 'ids = ""', 'ids = "mini/owl,mini/owl"'),
        "ids is 'mini/owl,mini/owl': mini/owl is there twice",
    ),
    (
        *("compare_localizers", 'ids = "mini/owl"', 'ids = "sd/monet"'),
        "ids is 'sd/monet': no concept 'sd/monet'",
    ),
    (
        *("neurons", 'other = ""', 'other = "mini/neon, mini/owl"'),
        "other is 'mini/neon, mini/owl': give one concept",
    ),
    ("edit", 'concept = "mini/owl"', 'concept = ""', "concept is '': give an id"),
    ("erase_many", 'kind = "object"', 'kind = ""', "kind is '': use one of 'style'"),
    *[
        (
            *("edit_sweep", "prompts = 4", f"prompts = {prompts}"),
            f"prompts is {prompts}: as many others should be left to report on, and concept "
            "'neon' has 8 prompts in all: use at most 4",
        )
        for prompts in (6, 8)
    ],
    ("edit_sweep", "prompts = 1", "prompts = 0", "prompts is 0: give a number from 1 up"),
    (
        *("localize", OWN, OWN.replace(" in neon", "")),
        "prompt and target are both 'a cat': a target leaves the concept out",
    ),
    ("localize", OWN, 'prompt = "a cat in neon"\nkind = "fact"', "has an empty target"),
    (
        *("causal_trace", 'subject = "style of neon"', 'subject = "zebra"'),
        "subject is 'zebra': the prompt",
    ),
    ("steps", "seeds = 2", "seeds = 1", "seeds is 1: the reference is compared with itself"),
    ("steps", "enough = 1.0", "enough = 90.0", "enough is 90.0: give a share above 0 and up"),
    (
        *("steps", 'steps = "49"\nreference = 50', 'steps = "100"\nreference = 50'),
        "steps is '100': give numbers below 50, the reference",
    ),
    ("benchmark", 'windows = "16"', 'windows = "2, 99"', "windows is '2, 99': "),
    (
        *("compare_editors", "threshold = 0.5", "threshold = nan"),
        "threshold is nan: give a finite number",
    ),
    ("compare_editors", "threshold = 0.5", "threshold = -inf", "threshold is -inf: give a"),
    ("compare_editors", 'editors = ""', 'editors = " "', "editors is ' ': write names"),
    ("benchmark", 'plants = ""', 'plants = " "', "plants is ' ': write names"),
    ("benchmark", 'localizers = ""', 'localizers = " "', "localizers is ' ': write names"),
    ("edit", 'becomes = "a cat"', 'becomes = " "', "becomes is ' ', spaces alone: write"),
    ("compare_editors", 'editors = "UCE"', 'editors = "uce"', "did you mean 'UCE'?"),
    ("benchmark", 'plants = "tune"', 'plants = "Tune, x"', "no name 'Tune'"),
]


@pytest.mark.parametrize(("notebook", "good", "bad", "words"), ONLY_A_KERNEL_FOUND)
def test_what_only_a_kernel_found_is_found_before(
    plan, notebook: str, good: str, bad: str, words: str
) -> None:
    """Each with its twin: a good value of the same parameter passes."""
    named = f'[[run]]\nname = "x"\nnotebook = "{notebook}"\n'
    named += 'concept = "mini/neon"\n' if notebook in ("edit_sweep", "causal_trace") else ""
    assert plan(f"{named}{good}\n")
    with pytest.raises(LocogenError, match=re.escape(words)):
        plan(f"{named}{bad}\n")


def test_values_that_do_not_go_together_can_be_left_out(plan) -> None:
    asked = 'notebook = "steps"\n[grid]\nsteps = ["4", "20"]\nreference = [10, 50]\n'
    with pytest.raises(LocogenError, match="steps is '20': give numbers below 10"):
        plan(asked)
    runs = plan(f'{asked}[[exclude]]\nsteps = "20"\nreference = 10\n')
    pairs = [(run.parameters["steps"], run.parameters["reference"]) for run in runs]
    assert pairs == [("4", 10), ("4", 50), ("20", 50)]


# What a notebook run by hand does not look at before its weights are there.
LATE_BY_HAND = ("threshold", "becomes", "kind =")


@pytest.mark.parametrize(
    ("notebook", "good", "bad"),
    [
        (notebook, good, bad)
        for notebook, good, bad, _ in ONLY_A_KERNEL_FOUND
        if notebook == "localize" or not bad.startswith(LATE_BY_HAND)
    ],
)
def test_a_notebook_run_by_hand_refuses_it_before_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch, notebook: str, good: str, bad: str
) -> None:
    import locogen.benchmarks.run
    import locogen.models.load

    def no_weights(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(locogen, "load", no_weights, raising=False)
    monkeypatch.setattr(locogen.benchmarks.run, "load_plant", no_weights)
    # How a notebook shows its tables is not for the tests that follow.
    monkeypatch.setattr("pandas.set_option", lambda *_: None)
    with pytest.raises(ZeroDivisionError):  # the twin: good values go on to the weights
        run_by_hand(notebook, good)
    with pytest.raises(LocogenError):
        run_by_hand(notebook, bad)


def run_by_hand(notebook: str, values: str) -> None:
    """Execute the cells of a notebook one after the other, with these values among its own."""
    names: dict[str, Any] = {}
    for cell in json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("%matplotlib inline", ""), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= tomllib.loads(values)


def test_neighbors_leave_as_many_prompts_to_report_on_too(plan, tmp_path: Path) -> None:
    pairs = [f'{{ prompt = "{thing} in %s", target = "{thing}" }}' for thing in ("a cat", "a dog")]
    many, few = ", ".join(pairs), pairs[0]
    text = "".join(
        f'["own/{name}"]\nname = "{name}"\nkind = "fact"\ntext = "a cow"\nmodel = "mini"\n'
        f"pairs = [{some % ((name,) * some.count('%s'))}]\n"
        for name, some in (("red", many), ("blue", few))
    )
    (tmp_path / "own.toml").write_text(text)
    asked = '[[run]]\nnotebook = "edit_sweep"\nconcept = "own/red"\nconcepts_file = "own.toml"\n'
    asked += "prompts = 1\n"
    with pytest.raises(LocogenError, match="concept 'blue' has 1 prompt in all: give it more"):
        plan(f"{asked}neighbors = 0\n")
    # The twin: among the first neighbors, which are the catalog's, all have enough.
    assert plan(f"{asked}neighbors = 2\n")


# Texts that planning compares with the catalog and with files; texts that may be anything.
SUBJECTS = {"model", "models_file", "concept", "concepts_file", "ids", "other", "scorer", "subject"}
ANYTHING = {"prompt", "target", "text", "becomes", "store"}
ARRANGED = {"results"}


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_no_text_of_a_notebook_goes_unchecked(notebook: Path) -> None:
    unchecked = []
    for name, parameter in texts_of(notebook).items():
        if name in SUBJECTS | ANYTHING:
            continue
        try:
            check_parameters({name: "?!"}, notebook)
        except LocogenError as error:
            assert str(error).startswith(f"{name} is '?!': ")
        else:
            unchecked.append(name)
        check_parameters({name: ast.literal_eval(parameter["default"])}, notebook)
    assert not unchecked


def texts_of(notebook: Path) -> dict[str, dict[str, str]]:
    """The parameters of a notebook that are texts, without those that a study sets itself."""
    return {
        name: parameter
        for name, parameter in parameters_of(notebook).items()
        if parameter["inferred_type_name"] == "str" and name not in ARRANGED
    }


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_what_a_text_is_about_is_looked_up_before_a_kernel_starts(plan, notebook: Path) -> None:
    """What names a model, a concept, a file or words of a prompt; and no text at all is spaces."""
    named = f'[[run]]\nname = "x"\nnotebook = "{notebook.stem}"\n'
    assert plan(named), "the twin: the notebook's own values pass"
    for name in texts_of(notebook):
        wrong = [" ", "?!"] if name in SUBJECTS else [" "]
        for value in wrong:
            with pytest.raises(LocogenError):
                plan(f'{named}{name} = "{value}"\n')


def test_names_written_here_are_those_that_there_are() -> None:
    """They are written twice, since a plan does not load torch."""
    from locogen.attacks.kinds import KINDS
    from locogen.attacks.result import attack_kinds
    from locogen.benchmarks.localizers import LOCALIZERS
    from locogen.editing.rivals.editors import editors

    assert {
        "editors": editors(),
        "attacks": attack_kinds(),
        "localizers": tuple(LOCALIZERS),
    } == NAMES
    assert attack_kinds() == tuple(KINDS)


def test_a_notebook_of_ones_own_may_mean_anything(plan, tmp_path: Path) -> None:
    write_notebook(tmp_path / "odd.ipynb", parameters='device: str = "gpu"\nseeds: int = 0')
    assert plan('[[run]]\nnotebook = "odd.ipynb"\nname = "x"\nseeds = -1\n')


# Models of one's own


def own_unet(folder: Path, layers: int) -> None:
    """As much of a pipeline's folder as a plan reads: the names of weights."""
    from numpy import zeros
    from safetensors.numpy import save_file

    (folder / "unet").mkdir(parents=True)
    names = [f"down_blocks.0.attentions.{n}.attn2.to_k.weight" for n in range(layers)]
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: zeros(1) for name in names}, weights)


def test_a_folder_of_ones_own_counts_its_pictures(plan, tmp_path: Path) -> None:
    own_unet(tmp_path / "mine", 5)
    lines = 'notebook = "localize"\nconcept = "mini/neon"\nseeds = 2\nmax_prompts = 1\n'
    mine, unknown = plan(
        f'[[run]]\nmodel = "./mine"\nname = "a"\n{lines}[[run]]\nmodel = "./own"\nname = "b"\n{lines}'
    )
    costs = Costs(tmp_path)
    subject = Concept("x", "style", (PromptPair("x", "y"),))
    assert costs.pictures(mine) == len(sweep(subject, n_layers=5, window=2, seeds=range(2)))
    assert costs.pictures(unknown) is None, "the twin: an empty folder says nothing"
    with pytest.raises(LocogenError, match=r"window is 6: \./mine has 5 layers"):
        plan(f'[[run]]\nmodel = "./mine"\nwindow = 6\n{lines}')


def test_models_come_from_a_file_of_ones_own(plan, tmp_path: Path) -> None:
    own_unet(tmp_path / "weights" / "mine", 5)
    family = 'family = "StableDiffusionPipeline"'
    own = tmp_path / "weights" / "models.toml"
    own.write_text(f'[models.mine]\nid = "mine"\n{family}\nwindow = 3\n')
    study = '[defaults]\nmodels_file = "weights/models.toml"\nseeds = 1\nmax_prompts = 1\n[[run]]\n'
    study += 'notebook = "localize"\nconcept = "mini/neon"\nmodel = "mine"\n'
    (run,) = plan(study)
    subject = Concept("x", "style", (PromptPair("x", "y"),))
    planned = len(sweep(subject, n_layers=5, window=3, seeds=range(1)))
    assert Costs(tmp_path).pictures(run) == planned, "with the window of its entry"
    own.write_text(f'[models.mine]\nid = "mine"\n{family}\nwindow = 2\n')
    assert plan(study)[0].key != run.key, "its settings are part of the result"
    with pytest.raises(LocogenError, match="no model 'mine'"):
        plan(study.replace('models_file = "weights/models.toml"', ""))
    with pytest.raises(LocogenError, match="no model 'mien': did you mean 'mini' or 'mine'"):
        plan(study.replace('"mine"', '"mien"'))
