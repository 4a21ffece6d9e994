"""Edits: change some layers' key and value matrices in closed form, apply it, undo it, share it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from locogen import markup
from locogen.editing.closed_form import LowRank
from locogen.editing.files import read_edit, write_edit, write_lora
from locogen.editing.fit import (
    Fit,
    Matrices,
    Options,
    Side,
    layers_to_edit,
    matrices_to_edit,
    readers,
    recipe_of,
)
from locogen.editing.weights import (
    WeightChange,
    apply_change,
    digest_of,
    is_applied,
    plain_name,
    remove_all,
    remove_change,
    weights_of,
)
from locogen.errors import LocogenError
from locogen.interventions.layer_inputs import LayerInputs, Tokens
from locogen.interventions.words import check_speakable, speaking_all
from locogen.models.compilation import uncompiled_module
from locogen.models.families import (
    check_encoders,
    check_phrasings,
    denoiser_of,
    family_of,
    warn_unread,
)
from locogen.phrasings import Phrasing, default_phrasings, own_phrasings
from locogen.plan import Concept, PromptPair, one_concept
from locogen.types import Pipeline

EDIT_FORMAT = 1  # of the file; raised when its meaning changes


@dataclass(frozen=True, eq=False)
class Edit:
    """A fitted change of key and value matrices, from `fit_edit`: apply it, undo it, share it.

    It holds low-rank factors, some tens of KB, and no weights of the model.

    Attributes:
        name: The concept's name; of several, all names.
        layers: Indices of the edited layers, counted from 0 in execution order.
        changes: The change of each weight, by the weight's name in the denoiser.
        digest: A hash of the weights that the edit was fitted on.
        recipe: How it was fitted: phrasings, options, model, versions; how large it is; and the
            words that only its phrasings use, as vectors (see `harden`).
        concepts: What it was fitted for; () of an edit from a file.

    Example:
        >>> pipe = load("mini")
        >>> edit = fit_edit(pipe, concept("mini/neon"), layers=[2, 3])
        >>> with edit.applied(pipe, strength=0.5):  # after it, the model is as it was
        ...     run = generate(pipe, ["a picture of a cat"], num_inference_steps=1, progress=False)
        >>> edit.apply_(pipe)
        >>> edit.undo_(pipe)
    """

    name: str
    layers: tuple[int, ...]
    changes: Mapping[str, LowRank]
    digest: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    concepts: tuple[Concept, ...] = field(default=(), repr=False)

    # --- on a model ------------------------------------------------------------------------------

    @contextmanager
    def applied(self, pipe: Pipeline, strength: float = 1.0) -> Iterator[None]:
        """Within the context the model has the edit; after it, its old weights, bit for bit.

        Args:
            pipe: The pipeline, or its denoiser.
            strength: How many times the change is added; 0.5 is half an edit.

        Returns:
            A context manager.

        Raises:
            LocogenError: On entering as `apply_`, on leaving as `undo_`; the model then stays as
                it is.
        """
        # The denoiser of now: the pipeline may have another one when the context is left.
        denoiser = denoiser_of(pipe)
        # An edit that is applied already makes `apply_change` raise, and must stay applied.
        applied_before = is_applied(denoiser, self._change)
        try:
            apply_change(denoiser, self._change, strength)
            yield
        finally:
            if not applied_before and is_applied(denoiser, self._change):
                remove_change(denoiser, self._change)

    def apply_(self, pipe: Pipeline, strength: float = 1.0) -> None:
        """Add the edit to the model's weights, rounded once to their type; all of it or nothing.

        Args:
            pipe: The pipeline, or its denoiser.
            strength: How many times the change is added; 0.5 is half an edit.

        Raises:
            LocogenError: The edit, or its own LoRA, is applied already; it was fitted on other
                weights (the message names the difference); or something else has changed the
                weights of an edit that is applied.
        """
        apply_change(denoiser_of(pipe), self._change, strength)

    def undo_(self, pipe: Pipeline) -> None:
        """Remove the edit: weights that no other edit changes get their original bits back.

        Edits that were fitted on the same weights can be removed in any order. An edit that was
        fitted on top of others is removed before them. A warning says where the edit's own LoRA
        was loaded as well, so that the change was applied twice.

        Args:
            pipe: The pipeline, or its denoiser.

        Raises:
            LocogenError: Neither the edit nor one loaded from its file is applied; an edit on top
                of it is; or something else has changed the weights since (a fused LoRA, fused
                projections, training, another type): then nothing is undone, and the message
                says what to do. See `undo_all`.
        """
        remove_change(denoiser_of(pipe), self._change)

    @cached_property
    def _change(self) -> WeightChange:
        return WeightChange(
            self.name,
            self.changes,
            self.digest,
            dtype=tuple(self.recipe.get("dtype", ())),
            hashed_as=self.recipe.get("hashed_as", {}),
        )

    def refit(self, pipe: Pipeline, layers: Iterable[int] | None = None) -> Edit:
        """Fit the same recipe on another model, or for other layers.

        Args:
            pipe: The pipeline to fit on.
            layers: A window, or indices of layers; None: the edit's own.

        Returns:
            A new edit.

        Raises:
            LocogenError: As `fit_edit`.
        """
        phrasings = [Phrasing(**phrasing) for phrasing in self.recipe["phrasings"]]
        options = Options(**self.recipe["options"])
        place = self.layers if layers is None else layers
        words = self.recipe.get("words")
        if not words:
            edit = _fit(pipe, self.name, phrasings, place, options)
            return replace(edit, concepts=self.concepts)
        vectors = _vectors(words)
        check_speakable(pipe, vectors)
        with speaking_all(pipe, vectors):
            edit = _fit(pipe, self.name, phrasings, place, options)
        recipe = {**edit.recipe, "words": words}
        return replace(edit, recipe=recipe, concepts=self.concepts)

    # --- in files --------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: factors in float64, everything else as metadata.

        Args:
            path: The file to write.

        Raises:
            LocogenError: The file cannot be written.
        """
        metadata = {
            "format": EDIT_FORMAT,
            "name": self.name,
            "layers": list(self.layers),
            "digest": self.digest,
            "recipe": dict(self.recipe),
        }
        write_edit(Path(path), metadata, self.changes)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote.

        Args:
            path: The edit's file.

        Returns:
            The edit, equal to the one that was saved.

        Raises:
            LocogenError: There is no such file, or it is cut short, from another program, or of a
                later format.
        """
        record, changes = read_edit(Path(path))
        if record.get("format") != EDIT_FORMAT:
            raise LocogenError(
                f"{path} is an edit of format {record.get('format')}, and this locogen reads "
                f"format {EDIT_FORMAT}: load it with the locogen that saved it, or fit the edit "
                "again"
            )
        try:
            edit = cls(
                name=record["name"],
                layers=tuple(record["layers"]),
                changes=changes,
                digest=record["digest"],
                recipe=record["recipe"],
            )
        except KeyError as error:
            raise LocogenError(f"{path} lacks {error}: save the edit again") from None
        return _with_plain_names(edit)

    def to_lora(
        self, path: str | Path, *, style: Literal["diffusers", "kohya"] = "diffusers"
    ) -> None:
        """Write the edit as a LoRA that any tool loads: `pipe.load_lora_weights(path)`.

        Args:
            path: The file to write, `.safetensors`.
            style: The names of the matrices. "diffusers": those of diffusers (peft), which ComfyUI
                reads too for SD 3, FLUX.1 and .2, Chroma, Qwen-Image and Krea 2. "kohya": those
                that kohya's tools and ComfyUI read, of Stable Diffusion's and SD-XL's U-Nets, of
                Qwen-Image and of Wan; diffusers reads them as well, except for Wan. The rank is in
                the file as `alpha`, so that the scale is 1. sd-scripts ignores the part of
                `entry=True`, and a warning says so.

        Raises:
            LocogenError: The family's pipeline loads no LoRA (PixArt), kohya's tools have no
                names for the model, the edit is one of several denoisers (Wan 2.2), or the file
                cannot be written.
        """
        # The change has rank n by its algebra, so nothing is approximated: the factors are
        # balanced, then rounded to float32. In half precision the tool that loads the LoRA rounds
        # both factors to the model's type and adds their product to each output, where the edit
        # was added to the weights and rounded once. Relative to what the edit changes in the
        # layers' outputs, the two differ by about 1e-6 in float32, 0.1 % in float16 and 1 % in
        # bfloat16 (`pytest tests/editing/test_lora.py -k half_precision`). Pictures of one seed
        # then differ a little; the LoRA is about as near to the edit in float32 as the edited
        # weights are.
        if not self.recipe.get("loads_lora", True):
            raise LocogenError(
                "the pipeline of this model cannot load LoRA: share the edit's own file (save), or "
                "the edited model (export)"
            )
        denoiser = self.recipe.get("denoiser", "unet")
        paths = {name: name.removesuffix(".weight") for name in self.changes}
        if self.recipe.get("in_turn"):
            paths = _in_one_denoiser(paths)
        modules = {name: f"{denoiser}.{path}" for name, path in paths.items()}
        if style == "kohya":
            modules = self._kohya_names()
        write_lora(Path(path), self.name, self.changes, modules, style)

    def _kohya_names(self) -> Mapping[str, str]:
        """What kohya's tools call each weight's module."""
        names = self.recipe.get("kohya_names")
        if not names:
            raise LocogenError(
                "kohya's tools have no names for these matrices, or an older locogen saved the "
                "edit without them: use style='diffusers', the default, or fit the edit again with "
                "edit.refit(pipe)"
            )
        outside = [name for name in names if ".attentions." not in name]
        if outside and self.recipe.get("denoiser", "unet") == "unet":
            warnings.warn(
                f"kohya's sd-scripts has no LoRA for {', '.join(outside)} and will ignore it: load "
                "the file with diffusers or ComfyUI",
                stacklevel=3,
            )
        return names

    def export(self, pipe: Pipeline, folder: str | Path, *, strength: float = 1.0) -> Path:
        """Write the whole pipeline with the edit merged, in diffusers' format.

        Args:
            pipe: The pipeline; it is left unchanged.
            folder: The folder to write to.
            strength: How many times the change is added.

        Returns:
            The folder.

        Raises:
            LocogenError: As `apply_`.
        """
        with self.applied(pipe, strength):
            pipe.save_pretrained(folder, safe_serialization=True)
        return Path(folder)

    def _repr_html_(self) -> str:
        size = 0  # bytes
        for change in self.changes.values():
            for factor in (change.up, change.down):
                size += factor.numel() * factor.element_size()
        relative_change = ""
        rounding = ""
        if self.recipe:
            relative_change = f"{max(self.recipe['relative_change'].values()):.3f} at most"
            rounding = f"{self.recipe['rounding']:.1e} of the change"
        facts = {
            "layers": ", ".join(map(str, self.layers)),
            "matrices": len(self.changes),
            "rank": max(change.rank for change in self.changes.values()),
            "relative change": relative_change,
            "lost to rounding": rounding,
            "size": f"{size / 1024:.0f} KB",
            "made for": self.recipe.get("model", ""),
        }
        return markup.shown("edit", name=self.name, facts=facts)


def _with_plain_names(edit: Edit) -> Edit:
    """The edit without what `torch.compile` adds to names; files of older versions may have it."""
    names = {plain_name(saved_name): saved_name for saved_name in edit.changes}
    if all(name == saved_name for name, saved_name in names.items()):
        return edit
    recipe = dict(edit.recipe)
    recipe["hashed_as"] = names  # the digest was taken with the saved names
    if "relative_change" in recipe:
        relative_change = recipe["relative_change"].items()
        recipe["relative_change"] = {plain_name(name): size for name, size in relative_change}
    changes = {name: edit.changes[saved_name] for name, saved_name in names.items()}
    return replace(edit, changes=changes, recipe=recipe)


def _vectors(words: Mapping[str, Any]) -> dict[str, Any]:
    """New words as a recipe has them, each as vectors, (vectors, width)."""
    import torch

    return {token: torch.tensor(vectors) for token, vectors in words.items()}


def undo_all(pipe: Pipeline, *, overwrite: bool = False) -> None:
    """Remove every edit that is applied: the original bits of the weights come back.

    That includes edits whose variable now holds another edit. Without any edit it warns and does
    not raise, so that a notebook's cell that cleans up can be run twice. A deep copy of an edited
    pipeline keeps the edit and cannot be undone.

    Args:
        pipe: The pipeline, or its denoiser.
        overwrite: Whether to put the originals back also if something else has changed the
            edited weights since. Its changes of other weights stay.

    Returns:
        None.

    Raises:
        LocogenError: Something else has changed the weights (see `Edit.undo_`), and `overwrite`
            is not set.

    Example:
        >>> pipe = load("mini")
        >>> edit = fit_edit(pipe, concept("mini/neon"), layers=[2, 3])
        >>> edit.apply_(pipe)
        >>> undo_all(pipe)
    """
    denoiser = denoiser_of(pipe)
    if not remove_all(denoiser, overwrite=overwrite):
        warnings.warn(
            f"no edit is applied to this {type(uncompiled_module(denoiser)).__name__}, so nothing "
            "was undone. A copy of an edited model keeps the edit: load the model again",
            stacklevel=2,
        )


def _in_one_denoiser(paths: Mapping[str, str]) -> dict[str, str]:
    """Paths of modules within the one denoiser that a file of LoRA is loaded into (Wan 2.2)."""
    denoisers = sorted({path.partition(".")[0] for path in paths.values()})
    if len(denoisers) > 1:
        raise LocogenError(
            f"the edit changes {' and '.join(denoisers)}, and a file of LoRA is loaded into one of "
            "them: fit an edit for the layers of each, and load the second one's with "
            "pipe.load_lora_weights(file, load_into_transformer_2=True)"
        )
    return {name: path.partition(".")[2] for name, path in paths.items()}


def fit_edit(
    pipe: Pipeline,
    concept: Concept | Sequence[Concept],
    *,
    layers: Iterable[int],
    phrasings: Sequence[Phrasing | PromptPair | tuple[str, str]] | None = None,
    subject: str | None = None,
    becomes: str | None = None,
    ridge: float = 0.01,
    ridge_v: float | None = None,
    tokens: Tokens | None = None,
    preserve: Sequence[str] = (),
    preserve_weight: float = 1.0,
    null_space: bool = False,
    ordinary: Sequence[str] = (),
    entry: bool = False,
    filtered: bool = False,
    anchored: bool = False,
    augmented: int = 0,
    matrices: Matrices = "kv",
    rounds: int = 0,
    side: Side = "input",
) -> Edit:
    """Fit the closed-form edit (LocoEdit, arXiv 2405.01008) that removes or changes a concept.

    The key and value matrices of some layers are changed so that the concept's text gives what
    another text gave. The model itself is not changed until the edit is applied. All sums are in
    float64, whatever the model's type.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What to edit, or several concepts that are solved for together.
        layers: A window, or indices of layers, counted from 0; with `entry`, also none.
        phrasings: Texts (source, target): the source names the concept, the target says what it
            should give instead. None: LocoEdit's for the concept's kind.
        subject: Words of the sources that are the concept; None: the concept's name.
        becomes: Words that the concept should turn into, such as "a cat"; "": nothing at all (as
            UCE and ESD erase). None: styles and objects are removed, a fact gets its pair's
            target.
        ridge: λ of keys and values, above 0, without a unit: a small one follows the targets, a
            large one keeps the weights.
        ridge_v: λ of the values; None: as the keys.
        tokens: Which states of a source are edited. "last_subject": the subject's last token, at
            each of its occurrences, where CLIP gathers the subject (the published choice).
            "subject": each of its tokens, for names of several. "end": the state after the
            prompt. "all": every position with padding, each towards the target's same position
            (TIME's choice: strong, and it harms neighbors unless λ is large and they are
            preserved). None: "subject" for families with T5, else "last_subject".
        preserve: Prompts whose states should give what they gave (UCE).
        preserve_weight: How much a preserved prompt counts next to a source, above 0.
        null_space: Whether the preserved prompts are kept exactly.
        ordinary: Captions of ordinary pictures: directions that they use are changed less
            (MEMIT's covariance).
        entry: Whether to edit also the map by which text enters outside of the layers: SD-XL's
            `add_embedding`, the `context_embedder` of SD 3 and FLUX, `txt_in` of Qwen-Image and
            Krea 2.
        filtered: Whether the null space keeps only those preserved prompts that an edit without
            them would change more than the mean (SPEED, arXiv 2503.07392): fewer directions are
            lost to the edit.
        anchored: Whether the null space also keeps what every prompt holds, the start mark and the
            mean of the empty prompt (SPEED).
        augmented: How often each preserved state is repeated with noise along the direction that
            the matrix answers least; with `filtered`, those of them that the edit would change more
            than the mean are kept (SPEED uses 10).
        matrices: "kv", or "v": values alone (SPEED), so that where attention looks stays; or "k".
        rounds: How many times the states that would bring the concept back are solved for, and
            edited as well (RECE, arXiv 2407.12383). See `harden` for trained ones.
        side: "input": the concept's states get other answers, which other states may still get.
            "output": what the matrices say of the concept beyond its targets is taken out of every
            answer, whatever the text (as weights are orthogonalized, arXiv 2406.11717). Then
            `ridge` is a share of the concept's size, and `matrices="v"` leaves attention alone.

    Returns:
        The `Edit`.

    Raises:
        LocogenError: A name for a concept, empty or equal phrasings, a prompt without its subject,
            an option out of its range, a layer that the model does not have, a pipeline without its
            text encoders, or weights that are not finite, quantized, stored in float8, or carry
            LoRA.

    Example:
        >>> pipe = load("mini")
        >>> edit = fit_edit(pipe, concept("mini/neon"), layers=[2, 3], tokens="end", ridge=1.0)
        >>> edit.layers, len(edit.changes)  # keys and values of each layer
        ((2, 3), 4)
    """
    # In SD-XL one state holds both encoders'. T5 reads in both directions, so in IF, PixArt, SD 3
    # and FLUX also the other words of a prompt carry something of the subject, which stays. IF is
    # edited after each layer's norm; SD 3 and FLUX on the text side of joint blocks, whose input
    # is the mean over a short run of the prompt (`layer_inputs.LayerInputs`).
    concepts = _concepts_of(concept)
    if phrasings is not None and len(concepts) > 1:
        raise LocogenError(
            "phrasings= is for one concept: leave it out, or edit the concepts one by one"
        )

    if phrasings is not None:
        phrasings_to_fit = list(own_phrasings(phrasings, subject or concepts[0].name))
    else:
        phrasings_to_fit: list[Phrasing] = []
        for one in concepts:
            phrasings_to_fit += default_phrasings(one, becomes)
    options = Options(
        ridge=ridge,
        ridge_v=ridge_v,
        tokens=family_of(pipe).tokens if tokens is None else tokens,
        preserve=preserve,
        preserve_weight=preserve_weight,
        null_space=null_space,
        ordinary=ordinary,
        entry=entry,
        filtered=filtered,
        anchored=anchored,
        augmented=augmented,
        matrices=matrices,
        rounds=rounds,
        side=side,
    )
    name = " + ".join(one.name for one in concepts)
    edit = _fit(pipe, name, phrasings_to_fit, layers, options)
    return replace(edit, concepts=tuple(concepts))


def _concepts_of(concept: Any) -> list[Concept]:
    """One concept or several, as a list; raises `LocogenError` for none, or for names."""
    several = [concept] if isinstance(concept, (Concept, str)) else concept
    concepts = [one_concept(each) for each in several]
    if not concepts:
        raise LocogenError("there is no concept to edit: give at least one")
    return concepts


def _fit(
    pipe: Pipeline,
    name: str,
    phrasings: Sequence[Phrasing],
    layers: Iterable[int],
    options: Options,
) -> Edit:
    """The edit of these phrasings. Its warnings point at the caller of its caller."""
    family_of(pipe)  # refuses unknown families before anything else
    check_encoders(pipe)
    edited_layers = layers_to_edit(pipe, layers, may_be_none=options.entry)
    check_phrasings(pipe, phrasings)
    prompts: list[str] = []
    for phrasing in phrasings:
        prompts += [phrasing.source, phrasing.target]
    warn_unread(pipe, [*prompts, *options.preserve, *options.ordinary], stacklevel=3)

    matrices = matrices_to_edit(pipe, edited_layers, options)
    weights = weights_of(denoiser_of(pipe), [matrix.weight_name for matrix in matrices])
    # CUDA has float64. Other accelerators may have none: there, the CPU solves.
    first = next(iter(weights.values()))
    device = first.device if first.is_cuda else "cpu"

    fit = Fit(LayerInputs(pipe, edited_layers), phrasings, options, device)

    def solved() -> dict[str, LowRank]:
        names = {matrix: matrix.weight_name for matrix in matrices}
        return {name: fit.change(matrix, weights[name]) for matrix, name in names.items()}

    changes = solved()
    if options.rounds:
        read = readers(pipe, options)
        reading = weights_of(denoiser_of(pipe), [matrix.weight_name for matrix in read])
        for _ in range(options.rounds):
            fit.add_returning(read, reading, changes)
            changes = solved()
    return Edit(
        name=name,
        layers=tuple(layer.index for layer in edited_layers),
        changes=changes,
        digest=digest_of(weights),
        recipe=recipe_of(pipe, phrasings, options, weights, changes),
    )
