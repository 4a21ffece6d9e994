"""Edits: fit a closed-form change of some layers' key and value matrices, apply it, undo it, share it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locogen import __version__
from locogen.editing import closed_form as solve
from locogen.editing.files import read_edit, write_edit, write_lora
from locogen.editing.fit import Fit, Options
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
from locogen.interventions.layer_inputs import LayerInputs
from locogen.models.compilation import uncompiled_module
from locogen.models.families import (
    check_encoders,
    check_phrasings,
    denoiser_of,
    family_of,
    warn_unread,
)
from locogen.models.layers import Layer, find_layers
from locogen.phrasings import Phrasing, default_phrasings, own_phrasings
from locogen.plan import Concept, PromptPair

if TYPE_CHECKING:
    from torch import Tensor

EDIT_FORMAT = 1  # of the file; raised when its meaning changes


@dataclass(frozen=True, eq=False)
class Edit:
    """A fitted change of key and value matrices: `changes` by parameter name, and the `recipe` that made it.

    It holds factors only, some tens of KB, and no weights. `digest` tells the weights that it was made for.
    """

    name: str
    layers: tuple[int, ...]
    changes: Mapping[str, solve.LowRank]
    digest: str
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _change(self) -> WeightChange:
        kinds = tuple(self.recipe.get("dtype", ()))
        return WeightChange(
            self.name, self.changes, self.digest, kinds, self.recipe.get("hashed_as", {})
        )

    @contextmanager
    def applied(self, pipe: Any, strength: float = 1.0) -> Iterator[None]:
        """Within the context the model carries the edit, `strength` times; after it, its own weights, bit for bit.

        Args:
            pipe: The pipeline, or its denoiser.
            strength: How many times the change is added.

        Raises:
            LocogenError: On entering as `apply_`, on leaving as `undo_`; the model then stays as it is.
        """
        denoiser = denoiser_of(
            pipe
        )  # the one of now: the pipeline may have another one when the context is left
        outer = is_applied(
            denoiser, self._change
        )  # then applying raises, and what is applied stays applied
        try:
            apply_change(denoiser, self._change, strength)
            yield
        finally:
            if not outer and is_applied(denoiser, self._change):
                remove_change(denoiser, self._change)

    def apply_(self, pipe: Any, strength: float = 1.0) -> None:
        """Add the edit to the model's weights, rounded once to their own type; all of it or nothing.

        Args:
            pipe: The pipeline, or its denoiser.
            strength: How many times the change is added.

        Raises:
            LocogenError: The edit, or its own LoRA, is applied already; it was made for other weights (the message
                names the difference); or something else has changed the weights of an edit that is applied.
        """
        apply_change(denoiser_of(pipe), self._change, strength)

    def undo_(self, pipe: Any) -> None:
        """Take the edit off again: the original bits, where no other edit is left.

        Edits fitted on the same weights come off in any order; one fitted on top of others before those. Warns where
        the edit's own LoRA was loaded as well, so that the change was there twice.

        Args:
            pipe: The pipeline, or its denoiser.

        Raises:
            LocogenError: Neither the edit nor one loaded from its file is applied; an edit on top of it is; or
                something else has changed the weights since (a fused LoRA, fused projections, training, another
                type): then nothing is undone, and the message says what to do. See `undo_all`.
        """
        remove_change(denoiser_of(pipe), self._change)

    def refit(self, pipe: Any, layers: Iterable[int] | None = None) -> Edit:
        """The same recipe on another model, or for other layers."""
        recipe = self.recipe
        told = [Phrasing(**p) for p in recipe["phrasings"]]
        return _fit(
            pipe,
            self.name,
            told,
            self.layers if layers is None else layers,
            Options(**recipe["options"]),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: factors in float64, everything else as metadata."""
        told = {
            "format": EDIT_FORMAT,
            "name": self.name,
            "layers": list(self.layers),
            "digest": self.digest,
        }
        write_edit(Path(path), told | {"recipe": dict(self.recipe)}, self.changes)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote.

        Args:
            path: The edit's file.

        Raises:
            LocogenError: The file is not there, is cut short, is another program's, or of a later format.
        """
        record, changes = read_edit(Path(path))
        if record.get("format") != EDIT_FORMAT:
            raise LocogenError(
                f"{path} is an edit of format {record.get('format')}, this locogen reads {EDIT_FORMAT}"
            )
        try:
            edit = cls(
                record["name"], tuple(record["layers"]), changes, record["digest"], record["recipe"]
            )
        except KeyError as error:
            raise LocogenError(
                f"{path} lacks {error}: it is no whole edit; save it again"
            ) from None
        return _with_plain_names(edit)

    def to_lora(
        self, path: str | Path, *, style: Literal["diffusers", "kohya"] = "diffusers"
    ) -> None:
        """Write the edit as a LoRA that any tool loads: `pipe.load_lora_weights(path)`.

        The change has rank n by its algebra, so nothing is approximated: the factors are balanced, then rounded to
        float32. The LoRA is exact in float32 only. In half precision the tool that loads it rounds both factors to
        the model's type and adds their product to each output, where the edit was added to the weights and rounded
        once. Relative to what the edit changes in the layers' outputs, the two differ by about 1e-6 in float32, 0.1 %
        in float16 and 1 % in bfloat16 (measured by `pytest tests/editing/test_lora.py -k half_precision`). Pictures of
        one seed then differ a little; the LoRA is about as near to the edit in float32 as the edited weights are.

        Args:
            path: The file to write, `.safetensors`.
            style: The names of the matrices. "diffusers": those of diffusers (peft). "kohya": those that kohya's
                sd-scripts, ComfyUI and diffusers read, of Stable Diffusion's and SD-XL's U-Nets; the rank stands in
                the file as `alpha`, so that the scale is 1. sd-scripts has no LoRA beside the layers: of an edit with
                `entry=True` it ignores that part, and a warning says so.

        Raises:
            LocogenError: The family's pipeline loads no LoRA (PixArt), kohya's tools have no names for the model, or
                the file cannot be written.
        """
        denoiser = self.recipe.get("denoiser", "unet")
        if not self.recipe.get("loads_lora", True):
            raise LocogenError(
                "this model's pipeline loads no LoRA: share the edit's own file, or export() the model"
            )
        modules = {name: f"{denoiser}.{name.removesuffix('.weight')}" for name in self.changes}
        if style == "kohya":
            modules = self._kohya_names()
        write_lora(Path(path), self.name, self.changes, modules, style)

    def _kohya_names(self) -> Mapping[str, str]:
        """What kohya's tools call each weight's module."""
        names = self.recipe.get("kohya_names")
        if not names:
            raise LocogenError(
                "kohya's tools have no names for these matrices, or the edit's file is of an older locogen, which did "
                "not keep them: use style='diffusers', the default, or fit the edit again with edit.refit(pipe)"
            )
        beside = [name for name in names if ".attentions." not in name]
        if beside:
            warnings.warn(
                f"kohya's sd-scripts has no LoRA for {', '.join(beside)} and will ignore it; diffusers and ComfyUI "
                "read it",
                stacklevel=3,
            )
        return names

    def export(self, pipe: Any, folder: str | Path, *, strength: float = 1.0) -> Path:
        """Write the whole pipeline with the edit merged, in diffusers' format; the pipeline itself stays as it is."""
        with self.applied(pipe, strength):
            pipe.save_pretrained(folder, safe_serialization=True)
        return Path(folder)

    def _repr_html_(self) -> str:
        size = sum(
            t.numel() * t.element_size() for c in self.changes.values() for t in (c.up, c.down)
        )
        told = {
            "layers": ", ".join(map(str, self.layers)),
            "matrices": len(self.changes),
            "rank": max(c.rank for c in self.changes.values()),
            "relative change": f"{max(self.recipe['relative_change'].values()):.3f} at most"
            if self.recipe
            else "",
            "lost to rounding": f"{self.recipe['rounding']:.1e} of the change"
            if self.recipe
            else "",
            "size": f"{size / 1024:.0f} KB",
            "made for": self.recipe.get("model", ""),
        }
        rows = "".join(
            f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in told.items()
        )
        return f"<p><b>Edit</b> of {escape(self.name)}</p><table>{rows}</table>"


def _with_plain_names(edit: Edit) -> Edit:
    """The edit without what `torch.compile` adds to names; files of older versions may have it.

    Its digest was taken with those names, so they are kept for comparing it.
    """
    raw_names = {plain_name(name): name for name in edit.changes}
    if all(name == raw for name, raw in raw_names.items()):
        return edit
    recipe = dict(edit.recipe)
    recipe["hashed_as"] = raw_names
    if "relative_change" in recipe:
        recipe["relative_change"] = {
            plain_name(name): size for name, size in recipe["relative_change"].items()
        }
    changes = {name: edit.changes[raw] for name, raw in raw_names.items()}
    return replace(edit, changes=changes, recipe=recipe)


def undo_all(pipe: Any, *, overwrite: bool = False) -> None:
    """Take off every edit that is applied, also those whose name was given to another: the original bits come back.

    Where no edit is applied it warns, and does not raise: a notebook's cell that cleans up can be run twice. A deep
    copy of an edited pipeline keeps the edit for good, and is such a model.

    Args:
        pipe: The pipeline, or its denoiser.
        overwrite: Put the originals back also where something else has changed the edited weights since. What it has
            changed in other weights stays.

    Raises:
        LocogenError: Something else has changed the weights (see `Edit.undo_`), and `overwrite` is not set.
    """
    denoiser = denoiser_of(pipe)
    if not remove_all(denoiser, overwrite=overwrite):
        warnings.warn(
            f"no edit is applied to this {type(uncompiled_module(denoiser)).__name__}: there was nothing "
            "to undo (a copy of an edited model keeps the edit; load the model again)",
            stacklevel=2,
        )


def fit_edit(
    pipe: Any,
    concept: Concept | Sequence[Concept],
    *,
    layers: Iterable[int],
    phrasings: Sequence[Phrasing | PromptPair | tuple[str, str]] | None = None,
    subject: str | None = None,
    becomes: str | None = None,
    **options: Any,
) -> Edit:
    """The closed-form edit (LocoEdit, arXiv 2405.01008) that lets some layers hear a concept as something else.

    `concept`: one, or several that are solved for jointly; its default phrasings are LocoEdit's by kind, or give
    your own as (source, target), with the `subject` words that they share (default: the concept's name). `becomes`:
    what the concept turns into, "a cat"; "" for nothing at all (as UCE and ESD erase); without it styles and objects
    go. `layers`: a window, or any ints.

    Options, see `Options`: `ridge` λ of keys (and of values, unless `ridge_v`): small follows the target, large
    keeps the weights. `tokens`, which states are edited (None: the family's, see below): "last_subject", where CLIP
    gathers the subject (the published choice); "subject", each of its tokens, for names of many; both at every
    occurrence, never at punctuation; "end", the state
    after the prompt, for text towers that gather there; "all", every position, padding included, against the target's
    same position (TIME's choice: strong, and harmful to neighbors, unless λ is large and they are preserved).
    `preserve`: prompts whose states should go where they went, weighted by `preserve_weight` (UCE); with `null_space`,
    exactly. `ordinary`: captions whose covariance says which directions are dear (MEMIT). `entry`: edit also the map
    by which text enters beside or before the layers: SD-XL's `add_embedding` (the pooled vector), the
    `context_embedder` of SD 3 and FLUX; off by default.

    SD-XL: one state holds both encoders'. T5 hears both ways, so in IF, PixArt, SD 3 and FLUX each subject token is
    edited by default, and the other words still tell of it. IF: after each layer's norm. SD 3 and FLUX: the text side
    of joint blocks, as a short run of the prompt reads it on average (`readings.LayerInputs`).

    Solved in float64 whatever the model's type. Raises `LocogenError` for empty or equal phrasings, a prompt without
    its subject, λ <= 0, a layer that is not there, a pipeline without its text encoders, and weights that are
    non-finite, quantized, stored in float8, or carry LoRA.
    """
    concepts = [concept] if isinstance(concept, Concept) else list(concept)
    if not concepts:
        raise LocogenError("there is no concept to edit: give at least one")
    if phrasings is not None and len(concepts) > 1:
        raise LocogenError("several concepts have phrasings of their own: leave out phrasings=")
    told = (
        [p for c in concepts for p in default_phrasings(c, becomes)]
        if phrasings is None
        else own_phrasings(phrasings, subject or concepts[0].name)
    )
    chosen = {
        name: value for name, value in options.items() if name != "tokens" or value is not None
    }
    chosen.setdefault("tokens", family_of(pipe).tokens)
    return _fit(pipe, " + ".join(c.name for c in concepts), told, layers, Options(**chosen))


def _fit(
    pipe: Any, name: str, phrasings: Sequence[Phrasing], layers: Iterable[int], options: Options
) -> Edit:
    family = family_of(pipe)
    denoiser = denoiser_of(pipe)
    check_encoders(pipe)
    edited = _chosen(find_layers(pipe), layers)
    check_phrasings(pipe, phrasings)
    prompts = [text for phrasing in phrasings for text in (phrasing.source, phrasing.target)]
    warn_unread(pipe, [*prompts, *options.preserve, *options.ordinary], stacklevel=3)
    # The names of the model as it is saved: a compiled one is the same model, and its edits fit every other.
    paths = {module: plain_name(path) for path, module in denoiser.named_modules()}
    places: list[
        tuple[Layer | None, str, str]
    ] = []  # layer (None: beside the layers), matrix, name of its weight
    for layer in edited:
        for matrix, module in family.matrices(layer.module).items():
            places.append((layer, matrix, f"{paths[module]}.weight"))
    if options.entry:
        if family.text_projection is None:
            raise LocogenError(
                f"{family.name} has no map beside its layers that could be edited: leave out entry=True"
            )
        places.append((None, "k", f"{family.text_projection}.weight"))
    weights = weights_of(denoiser, [weight_name for _, _, weight_name in places])
    first = next(iter(weights.values()))
    fit = Fit(
        LayerInputs(pipe, edited), phrasings, options, first.device if first.is_cuda else "cpu"
    )
    changes = {
        weight_name: fit.change(weights[weight_name], layer, matrix)
        for layer, matrix, weight_name in places
    }
    recipe = _recipe(pipe, phrasings, options, weights, changes)
    recipe["denoiser"] = family.denoiser
    recipe["loads_lora"] = hasattr(pipe, "load_lora_weights")
    if family.kohya_name is not None:
        recipe["kohya_names"] = {
            n: family.kohya_name(denoiser, n.removesuffix(".weight")) for n in changes
        }
    return Edit(name, tuple(layer.index for layer in edited), changes, digest_of(weights), recipe)


def _chosen(found: Sequence[Layer], layers: Iterable[int]) -> list[Layer]:
    if isinstance(layers, str) or not (wanted := tuple(dict.fromkeys(int(i) for i in layers))):
        raise LocogenError(
            f"layers is {layers!r}: give a window or the numbers of some of find_layers(pipe)"
        )
    beyond = [i for i in wanted if not 0 <= i < len(found)]
    if beyond:
        raise LocogenError(f"layers {beyond} are not there: the model has 0 to {len(found) - 1}")
    joined = [i for i in wanted if found[i].joined]
    if joined:
        raise LocogenError(
            f"layers {joined} read text and picture by the same matrices, so an edit would change both: take layers "
            f"below {min(layer.index for layer in found if layer.joined)}"
        )
    return [found[i] for i in wanted]


def _recipe(
    pipe: Any,
    told: Sequence[Phrasing],
    options: Options,
    weights: Mapping[str, Tensor],
    changes: Mapping[str, solve.LowRank],
) -> dict[str, Any]:
    relative, lost = {}, 0.0
    for name, weight in weights.items():
        old, change = weight.detach().cpu().double(), changes[name].change
        relative[name] = float(change.norm() / old.norm())
        rounded = (old + change).to(weight.dtype).double()
        lost = max(lost, float((rounded - old - change).norm() / change.norm().clamp_min(1e-300)))
    return {
        "phrasings": [vars(p) for p in told],
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()},
        "model": _model_name(pipe),
        "revision": getattr(
            getattr(getattr(pipe, "text_encoder", None), "config", None), "_commit_hash", None
        ),
        "dtype": sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()}),
        "relative_change": relative,
        "rounding": lost,
        "versions": {"locogen": __version__}
        | {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _model_name(pipe: Any) -> str:
    """The hub id, or the last two names of the folder: a shared file tells nothing of its maker's disk."""
    told = str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
    return "/".join(Path(told).parts[-2:])
