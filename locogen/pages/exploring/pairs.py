"""Pictures before and after an edit, in pairs, from the table of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from locogen.markup import number
from locogen.pages.exploring.album import Album
from locogen.views.tables import missing

# Group of a prompt → what its pictures show; also the order in which they are shown. The group is
# its measure, unless the table has a column `group`, as where several concepts are erased.
GROUPS = {
    "efficacy": "The concept",
    "generality": "The concept in other words",
    "specificity": "Neighbors, which should stay",
    "ordinary": "Prompts without the concept",
    "name": "Its name alone",
    "short": "A short prompt",
    "long": "Long prompts",
    "variant": "Variants of its prompts",
    "implicit": "Prompts that ask for it without its name",
    "rest": "What else its prompts name, which should stay",
    "erased": "What was erased",
    "kept": "Other concepts, which should stay",
    "plain": "Prompts without any of these concepts",
}
# Whether the scorer recognizes what the prompt asks for, before and after, in words.
RECOGNIZED = {
    (True, True): "recognized before and after",
    (True, False): "recognized before, not after",
    (False, True): "recognized after, not before",
    (False, False): "recognized neither before nor after",
}
NEEDED = ("arm", "measure", "prompt", "seed", "before", "after", "image_before", "image_after")


@dataclass(frozen=True)
class Pair:
    """One prompt and seed under one arm: the picture before and the one after."""

    arm: str
    group: str
    prompt: str
    seed: int
    before: str
    """The name of the picture, as for `after`."""
    after: str
    words: str
    """What the scorer says of the two."""


def pairs_of(table: Any) -> list[Pair]:
    """The pairs of an evaluation, arm by arm; empty if it does not name its pictures.

    Args:
        table: The run's `evaluation.csv`.

    Raises:
        ValueError: The table has wrong values; also `TypeError`.
    """
    if not all(name in table for name in NEEDED):
        return []
    table = table.dropna(subset=["image_before", "image_after"])
    if "group" not in table:
        table = table.assign(group=table["measure"])
    order = {group: place for place, group in enumerate(GROUPS)}
    table = table.sort_values("group", key=lambda names: names.map(order), kind="stable")
    # Two probes of one prompt have the same pictures.
    table = table.drop_duplicates(["arm", "prompt", "seed"])
    pairs = []
    for row in table.to_dict("records"):
        pairs.append(
            Pair(
                arm=str(row["arm"]),
                group=str(row["group"]),
                prompt=str(row["prompt"]),
                seed=int(row["seed"]),
                before=str(row["image_before"]),
                after=str(row["image_after"]),
                words=_words(row),
            )
        )
    return pairs


def _words(row: Mapping[str, Any]) -> str:
    """`CLIP-score 0.82 → 0.29; recognized before, not after`."""
    text = f"CLIP-score {number(row['before'])} → {number(row['after'])}"
    before, after = row.get("right_before"), row.get("right_after")
    if missing(before) or missing(after):
        return text
    return f"{text}; {RECOGNIZED[bool(before), bool(after)]}"


def arms_of(pairs: Sequence[Pair]) -> list[str]:
    """The arms whose edit changed some picture, in the order of the pairs."""
    changed = [pair.arm for pair in pairs if pair.before != pair.after]
    return list(dict.fromkeys(changed))


def by_importance(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs as they should be shown if there is no room for all: the first arm, then seeds.

    So every arm is there to compare with, under fewer seeds, and not a few arms under all of them.
    """
    arms = list(dict.fromkeys(pair.arm for pair in pairs))
    seeds = list(dict.fromkeys(pair.seed for pair in pairs))

    def rank(pair: Pair) -> int:
        return 0 if pair.arm == arms[0] else 1 + seeds.index(pair.seed)

    return sorted(pairs, key=rank)


def pairs_data(pairs: Sequence[Pair], album: Album) -> dict[str, Any]:
    """What the page's script shows: plain values, those pairs that are in the album.

    Args:
        pairs: The pairs.
        album: The page's pictures.
    """
    shown: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        before, after = album.place(pair.before), album.place(pair.after)
        if before is None or after is None:
            continue
        shown.setdefault(pair.arm, []).append(_line(pair, before, after))
    return {"arms": [{"name": arm, "pairs": lines} for arm, lines in shown.items()]}


def _line(pair: Pair, before: int, after: int) -> dict[str, Any]:
    """A pair as the script shows it, with the places of its pictures."""
    return {
        "group": GROUPS.get(pair.group, pair.group),
        "prompt": pair.prompt,
        "seed": pair.seed,
        "before": before,
        "after": after,
        "words": pair.words,
    }


def bytes_of(pair: Pair) -> int:
    """How many bytes of a page its words take, at most, among fewer than 10000 pictures."""
    # As the template's `tojson` writes them: each of < > & ' takes six bytes.
    return len(htmlsafe_json_dumps(_line(pair, 9999, 9999))) + len(", ")
