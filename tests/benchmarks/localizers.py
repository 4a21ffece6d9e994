"""The localizers side by side on the mini model's concepts: what each says, how surely, what it costs, how they agree.

`python tests/benchmarks/localizers.py` asks all of them about every style, two objects and two facts of each kind,
prints tables and writes `runs/localizers/localizers.json`. Pictures are kept in the folder's store, so that a second call
only counts (and its seconds mean nothing: `fresh` says whether they do). `--half` makes pictures with the matrix
products of the denoiser in half precision, as `loco.speed` does: about 1.6 times as fast where the processor has them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

from carriers import selected
from machine import add_machine, kept, set_threads

import locogen as loco
from locogen import stats
from locogen.pictures.speed import Way, applied, half_of


def best_lines(found: loco.Located) -> list[dict[str, Any]]:
    """The largest estimate of each axis with its interval, as plain numbers."""
    rows: Any = found.effects[found.effects["position"].notna()]
    best = rows.loc[rows.groupby("axis", sort=False)["estimate"].idxmax()]
    columns = ["axis", "position", "estimate", "low", "high"]
    return [
        {"axis": a, "position": int(p), "estimate": e, "low": lo, "high": hi}
        for a, p, e, lo, hi in best[columns].to_numpy()
    ]


def answer(found: loco.Located, fresh: bool) -> dict[str, Any]:
    """What one localizer said."""
    start = found.carrier.start
    told: dict[str, Any] = {"carrier": None if start is None else [start, found.carrier.width]}
    told |= {
        "reason": found.carrier.reason,
        "side": found.side,
        "told": found.told,
        "best": best_lines(found),
    }
    total: Any = found.effects[found.effects["axis"] == "ceiling"]
    if len(total):
        told["ceiling"] = [float(total[name].iloc[0]) for name in ("estimate", "low", "high")]
    return told | {
        "generations": found.generations,
        "seconds": round(found.seconds, 1),
        "fresh": fresh,
    }


def said(found: loco.Located) -> str:
    """One cell of the printed table."""
    rows: Any = found.effects[found.effects["axis"].isin(["layer", "cross-attention"])].set_index(
        "position"
    )
    named = rows[rows.index.isin(list(found.carrier))] if len(found.carrier) else rows
    start = int(named["estimate"].idxmax())
    line = rows.loc[start]
    named = (
        str(found.carrier) if found.carrier.start is not None else f"none ({found.carrier.reason})"
    )
    value = f"{line['estimate']:.3g} [{line['low']:.3g}, {line['high']:.3g}] at {start}"
    side = f"; side: {found.side or 'cannot tell'}" if found.method == "causal tracing" else ""
    return f"{named}: {value}{side}; {found.generations} pictures, {found.seconds:.0f} s"


def in_half(pipe: Any, half: bool) -> contextlib.AbstractContextManager[None]:
    """Half precision in the denoiser, where it is asked for."""
    device = pipe._execution_device
    return applied(pipe, Way(half=half_of(device) if half else None))


def compared(pipe: Any, identity: str, chosen: Any) -> dict[str, Any]:
    """All localizers on one concept, and each pair of them."""
    concept = loco.concept(identity)
    concept = dataclasses.replace(concept, pairs=concept.pairs[: chosen.prompts or None])
    store = chosen.folder / "store"
    options: dict[str, Any] = {
        "seeds": range(chosen.seeds),
        "num_inference_steps": chosen.steps,
        "scorer": "mini",
    }
    options |= {"window": chosen.window, "store": store, "progress": False}
    options["batch_size"] = chosen.batch_size
    found, told = [], {}
    for method in loco.localizers()["name"]:
        before = len(list(store.glob("*.png")))
        with in_half(pipe, chosen.half):
            located = loco.locate(pipe, concept, method, **options)
        made = len(list(store.glob("*.png"))) > before or method == "attention contribution"
        found.append(located)
        told[method] = answer(located, made)
    pairs = [loco.agree(*pair)._asdict() for pair in itertools.combinations(found, 2)]
    words = [said(one) for one in found]
    return {"kind": concept.kind, "said": words, "localizers": told, "agreement": pairs}


def report_answers(found: dict[str, Any]) -> None:
    """The printed table of how often each localizer names layers, and the same as LocoGen, with 95 % intervals."""
    print("\n| localizer | names layers | the same as LocoGen where both do | pictures a concept |")
    for method in loco.localizers()["name"]:
        answers = [each["localizers"][method] for each in found.values()]
        names = share(sum(one["carrier"] is not None for one in answers), len(answers))
        pairs = [pair for each in found.values() for pair in each["agreement"]]
        of_method = [
            pair for pair in pairs if {pair["first"], pair["second"]} == {"locogen", method}
        ]
        same = [pair["same"] for pair in of_method if pair["same"] is not None]
        agrees = share(sum(same), len(same)) if same else "–"
        pictures = sum(one["generations"] for one in answers) / len(answers)
        print(f"| {method} | {names} | {agrees} | {pictures:.0f} |")


def report_sides(found: dict[str, Any]) -> None:
    """The printed table of the side of the model that each localizer names for told and untold facts."""
    print("\n| localizer | facts | text encoder | denoiser | no side |")
    for method, note in itertools.product(loco.localizers()["name"], ("told", "untold")):
        facts = [each for each in found.values() if each["note"].startswith(note)]
        sides = [each["localizers"][method]["side"] for each in facts if each["kind"] == "fact"]
        if sides:
            counts = [sides.count(side) for side in ("text encoder", "denoiser", None)]
            cells = " | ".join(share(count, len(sides)) for count in counts)
            print(f"| {method} | {note} | {cells} |")


def share(count: int, total: int) -> str:
    low, high = stats.clopper_pearson(count, total)
    return f"{count} of {total} [{low:.0%}, {high:.0%}]"


def report_agreement(found: dict[str, Any]) -> None:
    """The printed table of all pairs."""
    print("\n| concept | localizers | rank correlation [95 %] | same carrier |")
    for identity, told in found.items():
        for pair in told["agreement"]:
            value = f"{pair['correlation']:+.2f} [{pair['low']:+.2f}, {pair['high']:+.2f}]"
            print(f"| {identity} | {pair['first']}, {pair['second']} | {value} | {pair['same']} |")


def report_beyond_chance(found: dict[str, Any]) -> None:
    """The printed table of agreement over all concepts, beside shuffled concepts and the constant answer."""
    rows = [loco.Agreement(**pair) for told in found.values() for pair in told["agreement"]]
    print("\n| localizers | same | concepts shuffled | kappa [p] | constant answer |")
    for line in loco.agreement(rows).to_dict("records"):
        named = f"{line['first']}, {line['second']} ({line['concepts']} concepts)"
        kappa = f"{line['kappa']:.2f} [{line['p_value']:.3f}]"
        shares = f"{line['same']:.0%} | {line['shuffled']:.0%} | {kappa} | {line['constant']:.0%}"
        print(f"| {named} | {shares} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/localizers"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument(
        "--prompts", type=int, default=2, help="at most so many of each concept's prompts; 0: all"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument(
        "--each", type=int, default=2, help="objects, and facts of each kind; 0: all"
    )
    parser.add_argument("--only", nargs="*", default=None, help="concept ids in place of the above")
    parser.add_argument("--half", action="store_true", help="half precision in the denoiser")
    add_machine(parser)
    chosen = parser.parse_args()
    set_threads(chosen)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    pipe, table = loco.load(chosen.model, device=chosen.device), loco.concepts("mini")
    notes = table.set_index("id")["note"]
    found: dict[str, Any] = {}
    print(f"| concept | kind | {' | '.join(loco.localizers()['name'])} |")
    for identity in chosen.only or selected(table, chosen.each):
        measure = partial(compared, pipe, identity, chosen)
        measured = kept(chosen.folder / "concepts", identity, measure)
        print(f"| {identity} | {measured['kind']} | {' | '.join(measured['said'])} |", flush=True)
        found[identity] = {"note": str(notes[identity]), **measured}
        names = ("model", "seeds", "prompts", "steps", "window", "half")
        settings = {name: getattr(chosen, name) for name in names}
        told = {"settings": settings, "concepts": found}
        (chosen.folder / "localizers.json").write_text(json.dumps(told, indent=1, default=str))
    report_answers(found)
    report_sides(found)
    report_agreement(found)
    report_beyond_chance(found)


if __name__ == "__main__":
    main()
