"""What an attack found: a tidy table, vectors or tokens, and a sentence with its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen import markup, stats
from locogen.editing.evaluation import summary as evaluation_summary
from locogen.editing.files import read_recorded, write_recorded
from locogen.errors import LocogenError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

ATTACK_FORMAT = 1  # of the file; raised when its meaning changes
COLUMNS = (
    *("kind", "model", "strength", "prompt", "unit", "seed"),
    *("shown_before", "shown_after", "before", "after"),
)
WORDS_OF_KINDS = {
    "inversion": "after token vectors were trained in its words' place",
    "states": "after its text states were trained",
    "closed": "after its text states were solved for",
    "discrete": "with other tokens in its words' place",
    "relearn": "after the model was trained on a few pictures",
    "completion": "where the unedited model makes the first steps",
    "noise": "under the best of the seeds",
    "inpaint": "in the hole of a picture of it",
}


def attack_kinds() -> tuple[str, ...]:
    """List the kinds of attack that `attack` knows.

    Returns:
        Their names; `attack` says what each does.

    Example:
        >>> attack_kinds()[:3]
        ('inversion', 'states', 'closed')
    """
    return tuple(WORDS_OF_KINDS)


@dataclass(frozen=True, eq=False)
class Attack:
    """What `attack` returns: whether a concept that an edit removed comes back.

    Attributes:
        concept: The concept's name.
        kind: The kind of attack.
        table: One row a model, strength, prompt and seed: `kind model strength prompt unit seed
            shown_before shown_after before after`. `model`: "edited", "unedited", "placebo" (an
            edit of the same size about random words) or "never had" (the edited model, attacked
            for a concept that the model never had: what comes was taught). `strength`: steps,
            tokens, pictures, or seeds, whatever the kind counts. `shown_…`: 1 if the concept's
            text fits best among its neighbors', before by the prompt's own words. `before`,
            `after`: its probability among them.
        tensors: What was found by the last step, by model: tensors by name. Of vectors the name is
            the token.
        words: Tokens that were found, by model.
        settings: Everything that the attack was made with: the request, what it learned from and
            was judged on, hashes of the edit and the model, versions.

    Example:
        >>> pipe = load("mini")
        >>> neon = concept("mini/neon").first(2)
        >>> edit = fit_edit(pipe, neon, layers=[12, 13])
        >>> few = {"num_inference_steps": 1, "guidance_scale": 1.0, "seeds": [0]}
        >>> noise = {"kind": "noise", "models": ["edited"], "progress": False}
        >>> tried = attack(pipe, neon, edit, **noise, **few)
        >>> tried.table[["model", "strength", "prompt"]].to_dict("records")
        [{'model': 'edited', 'strength': 1, 'prompt': 'a picture of an owl in the style of neon'}]
        >>> list(tried.summary()["seeds"])
        [1]
    """

    concept: str
    kind: str
    table: pd.DataFrame
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """Average the table, with intervals: one row a model and strength.

        Args:
            level: Coverage of the intervals.

        Returns:
            A table of `model strength before after low high best best_low best_high n units
            seeds`. `after` is the share of pictures that show the concept, with an interval over
            units and seeds (see `summary` of an evaluation). `best` is the share of units of which
            any seed shows it, with an exact interval: best of so many against best of so many.
        """
        import pandas as pd

        lines = []
        rows: Any = self.table.groupby(["model", "strength"], sort=False)
        for (model, strength), part in rows:
            arm = part.rename(
                columns={"shown_before": "right_before", "shown_after": "right_after"}
            ).assign(arm="attack", measure="efficacy", sign=-1)
            shares = evaluation_summary(arm, level=level).set_index("quantity").loc["right"]
            hits, units = _any_seed(part, "shown_after")
            low, high = stats.clopper_pearson(hits, units, level)
            lines.append(
                {
                    "model": model,
                    "strength": strength,
                    "before": shares["before"],
                    "after": shares["after"],
                    "low": shares["after_low"],
                    "high": shares["after_high"],
                    "best": hits / units,
                    "best_low": low,
                    "best_high": high,
                    "n": int(shares["n"]),
                    "units": units,
                    # A row of a search for noise speaks of all seeds so far.
                    "seeds": strength if self.kind == "noise" else part["seed"].nunique(),
                }
            )
        return pd.DataFrame(lines)

    def sentence(self, level: float = 0.95) -> str:
        """Say in plain words what the attack brought back, with bounds and controls.

        Args:
            level: Coverage of the bounds.

        Returns:
            One line.
        """
        lines = self.summary(level).groupby("model", sort=False).tail(1).set_index("model")
        parts = []
        if "edited" in lines.index:
            edited = lines.loc["edited"]
            own_words = _share(self._before("edited"), level)
            parts.append(
                f"{self.concept} shows in {own_words} by its own words, and in "
                f"{_bounded(edited)} {WORDS_OF_KINDS[self.kind]}"
            )
        if "never had" in lines.index:
            parts.append(
                "the same attack brings a concept that the model never had in "
                f"{_bounded(lines.loc['never had'])}"
            )
        for model, name in (("placebo", "an edit about random words"), ("unedited", "no edit")):
            if model in lines.index:
                parts.append(f"with {name} {_bounded(lines.loc[model])}")
        return "; ".join(parts) + "."

    def evaluation(self, arm: str, model: str = "edited") -> pd.DataFrame:
        """The rows of one model as those of an evaluation, to be joined to its table.

        Args:
            arm: The name of the evaluation's arm.
            model: Which model's rows.

        Returns:
            A table like `evaluate`'s, with the kind of attack as the measure, at its largest
            strength: `summary(pd.concat([table, attack.evaluation("carrier")]))`.

        Raises:
            LocogenError: The attack has no such model.
        """
        self._check_model(model)
        rows: Any = self.table[self.table["model"] == model]
        rows = rows[rows["strength"] == rows["strength"].max()]
        names = {"shown_before": "right_before", "shown_after": "right_after"}
        columns = ["prompt", "unit", "seed", "before", "after", *names]
        return rows[columns].rename(columns=names).assign(arm=arm, measure=self.kind, sign=-1)

    def _check_model(self, model: str) -> None:
        models = list(dict.fromkeys(self.table["model"]))
        if model not in models:
            raise LocogenError(f"the attack has no model {model!r}: use one of {', '.join(models)}")

    def _before(self, model: str) -> pd.DataFrame:
        """The rows of a model's first strength: what its own words show is the same in all."""
        rows: Any = self.table[self.table["model"] == model]
        return rows[rows["strength"] == rows["strength"].iloc[0]]

    # --- in files --------------------------------------------------------------------------------

    def save(self, path: str | Path, model: str = "edited") -> None:
        """Write a safetensors file with what was found on one model, and the whole table.

        A file of vectors or tokens is a textual inversion: `pipe.load_textual_inversion(path)`
        reads it in any process.

        Args:
            path: The file to write.
            model: Whose vectors or states are written.

        Raises:
            LocogenError: The attack has no such model, or the file cannot be written.
        """
        self._check_model(model)
        record = {
            "format": ATTACK_FORMAT,
            "concept": self.concept,
            "kind": self.kind,
            "model": model,
            "words": {name: list(words) for name, words in self.words.items()},
            "settings": dict(self.settings),
            "table": self.table.to_csv(index=False),
        }
        write_recorded(Path(path), "attack", record, self.tensors.get(model, {}))

    @classmethod
    def load(cls, path: str | Path) -> Attack:
        """Read what `save` wrote: the table, and the tensors of the model that it was saved for.

        Args:
            path: The attack's file.

        Returns:
            The attack.

        Raises:
            LocogenError: There is no such file, or it is from another program or a later format.
        """
        import pandas as pd

        record, tensors = read_recorded(Path(path), "attack", ATTACK_FORMAT)
        return cls(
            concept=record["concept"],
            kind=record["kind"],
            table=pd.read_csv(StringIO(record["table"]), keep_default_na=False),
            tensors={record["model"]: tensors} if tensors else {},
            words={name: tuple(words) for name, words in record["words"].items()},
            settings=record["settings"],
        )

    def _repr_html_(self) -> str:
        table = markup.table_html(self.summary())
        return markup.shown("attack", way=self.kind, sentence=self.sentence(), table=table)


def _share(rows: pd.DataFrame, level: float) -> str:
    """What own words show, of the units, with the upper bound."""
    hits, units = _any_seed(rows, "shown_before")
    _, high = stats.clopper_pearson(hits, units, level)
    return f"{hits} of {units} (at most {high:.0%})"


def _any_seed(rows: pd.DataFrame, column: str) -> tuple[int, int]:
    """In how many units any seed shows the concept, and how many there are."""
    of_units: Any = rows.groupby("unit", sort=False)[column].max()
    return int(of_units.sum()), len(of_units)


def _bounded(line: Any) -> str:
    hits = round(float(line["best"]) * int(line["units"]))
    bounds = f"{line['best_low']:.0%} to {line['best_high']:.0%}"
    return f"{hits} of {int(line['units'])} ({bounds})"
