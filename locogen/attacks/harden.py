"""Harden an edit: the token vectors that bring its concept back are edited as well, in rounds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from locogen.attacks.goal import Goal, picture_settings, training_pairs
from locogen.attacks.kinds import Attacked, Options, check_words, inversion, whole_number
from locogen.attacks.loss import check_attackable, check_gradients
from locogen.attacks.training import folder_of, state_name
from locogen.console import open_bar
from locogen.editing.edit import Edit
from locogen.errors import LocogenError
from locogen.interventions.words import digest
from locogen.phrasings import Phrasing, default_phrasings, occurrences, put_for
from locogen.pictures.fingerprint import weights_of
from locogen.plan import Concept, PromptPair
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor


def harden(
    pipe: Pipeline,
    concept: Concept,
    edit: Edit,
    *,
    rounds: int = 1,
    training: Sequence[PromptPair] | None = None,
    steps: int = 200,
    rate: float = 0.02,
    batch: int = 16,
    vectors: int = 1,
    start: Literal["neighbors", "own"] = "neighbors",
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Edit:
    """Train token vectors that bring a concept back from an edit, and fit it against them too.

    A round trains the vectors of `attack`'s "inversion" on the edited model, puts them in the
    place of the concept's words in every phrasing of the edit, and solves again: the old phrasings,
    those of all rounds, and what the edit preserves, together. So do adversarial erasers (Receler,
    arXiv 2311.17717; AdvUnlearn, arXiv 2405.15234), which train where this solves.
    `fit_edit(rounds=…)` solves for the states instead, and trains nothing (RECE).

    It takes the rounds' own vectors away. Whether another training finds others, `attack` says:
    give it another `seed`.

    Args:
        pipe: A pipeline of Stable Diffusion 1 or 2, not edited, as from `load`.
        concept: What the edit removes.
        edit: The edit, from `fit_edit` or an earlier `harden`.
        rounds: How many times; 0: the edit as it is.
        training: Prompt pairs to learn from; None: every other pair of the concept, from the first.
        steps: Steps of each training.
        rate: AdamW's learning rate.
        batch: Pictures in a step.
        vectors: Token vectors in the place of the concept's words.
        start: What the vectors begin with: the mean of the neighbors' words, or the "own" words,
            which need as many vectors as they have tokens; further vectors repeat the last.
        seed: Of the first round's draws; each round takes the next.
        folder: Where pictures and the state of trainings are kept, so that a stopped call goes on;
            None: nowhere.
        progress: Whether to show progress bars.
        settings: `num_inference_steps`, `guidance_scale` and `batch_size` of `generate`.

    Returns:
        An edit whose recipe holds the vectors, so that it can be fitted on another model, or at
        other layers, against the same ones.

    Raises:
        LocogenError: Another family of models, float16, an option out of its range, a concept
            that the edit is not about, an edit whose phrasings do not name their subject, or as
            `fit_edit`.

    Example:
        >>> pipe = load("mini")
        >>> neon = concept("mini/neon").first(2)
        >>> edit = fit_edit(pipe, neon, layers=[12, 13])
        >>> few = {"steps": 1, "batch": 1, "num_inference_steps": 1, "progress": False}
        >>> harder = harden(pipe, neon, edit, **few)
        >>> list(harder.recipe["words"]), len(harder.recipe["phrasings"])
        (['<neon-1>'], 10)
    """
    import torch

    check_attackable(pipe, "harden")
    if not isinstance(concept, Concept) or not isinstance(edit, Edit):
        raise LocogenError(
            f"harden takes a Concept and an Edit, not {type(concept).__name__} and "
            f"{type(edit).__name__}: see concept() and fit_edit()"
        )
    check_gradients()
    rounds = whole_number("rounds", rounds, 0)
    picture_options = picture_settings("harden", settings)
    options = Options(
        steps=steps,
        at=(steps,),
        rate=rate,
        batch=batch,
        vectors=vectors,
        start=start,
        exhaustive=False,
        vocabulary=None,
        pictures=(0,),
        trained="text matrices",
        ridge=0.1,
        seed=seed,
    )
    with ExitStack() as stack:
        stack.enter_context(open_bar(progress))
        if folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = folder_of(folder)
        goal = Goal(
            pipe,
            concept,
            training=concept.pairs[::2] if training is None else training_pairs(training),
            probes=(),
            seeds=(),
            scorer=cast(Any, None),  # nothing is judged
            store=place / "pictures",
            settings={"progress": progress, **picture_options.as_dict()},
        )
        # Before a training: what cannot be edited, or said, should not cost one.
        if rounds:
            check_words(goal, options)
            _against(edit, concept, torch.zeros(0, 0))
        hardened = edit
        for number in range(rounds):
            of_round = replace(options, seed=seed + number)
            label = f"round {number + 1} of {rounds}"
            vectors_found = _trained(Attacked(goal, hardened, of_round, place, label, progress))
            hardened = _against(hardened, concept, vectors_found).refit(pipe)
    return hardened


def _trained(attacked: Attacked) -> Tensor:
    """Vectors that bring the concept back, (vectors, width)."""
    state = attacked.state
    if state is not None:
        state = state / state_name("harden", _facts(attacked))
    [attempt] = inversion(replace(attacked, state=state))
    [values] = attempt.tensors.values()
    return values.detach().cpu()


def _facts(attacked: Attacked) -> dict[str, Any]:
    """All that makes a difference to a training."""
    changes = attacked.edit.changes if isinstance(attacked.edit, Edit) else {}
    return attacked.goal.facts | {
        "options": asdict(attacked.options),
        "weights": weights_of(attacked.pipe),
        "edit": {name: digest(change.change) for name, change in changes.items()},
    }


def _against(edit: Edit, concept: Concept, vectors: Tensor) -> Edit:
    """The edit with a recipe that has the vectors in the place of its subjects' words as well."""
    words = dict(edit.recipe.get("words", {}))
    plain = "".join(letter if letter.isalnum() else "-" for letter in concept.name.lower())
    token = f"<{plain}-{len(words) + 1}>"
    phrasings = list(edit.recipe.get("phrasings", ()))
    if not phrasings:
        raise LocogenError(
            f"the edit of {edit.name!r} has no phrasings to put trained words into: give one from "
            "fit_edit"
        )
    named = _about(edit, concept, [one for one in phrasings if one["subject"] not in words])
    more = [vars(_spoken(Phrasing(**phrasing), token)) for phrasing in named]
    words[token] = vectors.tolist()
    return replace(edit, recipe={**edit.recipe, "phrasings": [*phrasings, *more], "words": words})


def _about(edit: Edit, concept: Concept, phrasings: Sequence[Any]) -> list[Any]:
    """The phrasings of one concept among those of an edit, which may be of several."""
    subjects = {phrasing.subject for phrasing in default_phrasings(concept)} | {concept.name}
    named = [phrasing for phrasing in phrasings if phrasing["subject"] in subjects]
    if named:
        return named
    if edit.name == concept.name:  # its own phrasings, in other words
        return list(phrasings)
    raise LocogenError(
        f"the edit is of {edit.name!r} and has no phrasing about {concept.name!r}: give a concept "
        "that it edits"
    )


def _spoken(phrasing: Phrasing, token: str) -> Phrasing:
    """The phrasing with a token in the place of its subject."""
    spans = occurrences(phrasing.source, phrasing.subject)
    if not spans:
        raise LocogenError(
            f"the phrasing {phrasing.source!r} does not have its subject {phrasing.subject!r}, so "
            "there is no place for trained vectors: fit the edit with phrasings that do"
        )
    return Phrasing(put_for(phrasing.source, spans, token), phrasing.target, token)
