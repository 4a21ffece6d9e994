"""Edits: fit a closed-form change of some layers' key and value matrices, apply it, undo it, share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locogen.editing import closed_form as solve
from locogen.editing.files import read_edit, write_edit, write_lora
from locogen.editing.fit import Fit, Options
from locogen.editing.weights import Patch, digest_of, is_on, put_on, take_all_off, take_off, weights_of
from locogen.errors import LocogenError
from locogen.interventions.layer_inputs import Reader
from locogen.models.families import denoiser_of, family_of
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
    def _patch(self) -> Patch:
        return Patch(self.name, self.changes, self.digest, tuple(self.recipe.get("dtype", ())))

    @contextmanager
    def applied(self, pipe: Any, strength: float = 1.0) -> Iterator[None]:
        """Within the context the model carries the edit, `strength` times; after it, its own weights, bit for bit."""
        denoiser = denoiser_of(pipe)
        outer = is_on(denoiser, self._patch)  # then applying raises, and what is on stays on
        try:
            self.apply_(pipe, strength)
            yield
        finally:
            if not outer and is_on(denoiser, self._patch):
                self.undo_(pipe)

    def apply_(self, pipe: Any, strength: float = 1.0) -> None:
        """Add the edit to the model's weights, rounded once to their own type; all of it or nothing.

        Raises `LocogenError`, naming the difference, for a model that it was not made for, and when it is applied.
        """
        put_on(denoiser_of(pipe), self._patch, strength)

    def undo_(self, pipe: Any) -> None:
        """Take the edit off again: the original bits, where no other edit is left.

        Edits fitted on the same weights come off in any order; one fitted on top of others before those. Raises
        `LocogenError` otherwise, and when neither the edit nor one loaded from its file is applied. See `undo_all`.
        """
        take_off(denoiser_of(pipe), self._patch)

    def refit(self, pipe: Any, layers: Iterable[int] | None = None) -> Edit:
        """The same recipe on another model, or for other layers."""
        recipe = self.recipe
        told = [Phrasing(**p) for p in recipe["phrasings"]]
        return _fit(pipe, self.name, told, self.layers if layers is None else layers, Options(**recipe["options"]))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: factors in float64, everything else as metadata."""
        told = {"format": EDIT_FORMAT, "name": self.name, "layers": list(self.layers), "digest": self.digest}
        write_edit(Path(path), told | {"recipe": dict(self.recipe)}, self.changes)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote. Raises `LocogenError` for a file that is cut short, another's, or of a later form."""
        told, changes = read_edit(Path(path))
        if told.get("format") != EDIT_FORMAT:
            raise LocogenError(f"{path} is an edit of format {told.get('format')}, this locogen reads {EDIT_FORMAT}")
        try:
            return cls(told["name"], tuple(told["layers"]), changes, told["digest"], told["recipe"])
        except KeyError as error:
            raise LocogenError(f"{path} lacks {error}: it is no whole edit; save it again") from None

    def to_lora(self, path: str | Path, *, style: Literal["diffusers", "kohya"] = "diffusers") -> None:
        """Write the edit as a LoRA that any tool loads, without loss: `pipe.load_lora_weights(path)`.

        The change has rank n by its algebra, so nothing is approximated; the factors are balanced, then rounded to
        float32. `style`: the names that diffusers (peft) uses, or those of kohya-style tools, which carry the rank
        as `alpha` so that the scale is 1; those exist for U-Nets only, and not for IF's. Raises `LocogenError` for a
        family whose pipeline loads no LoRA (PixArt).
        """
        denoiser = self.recipe.get("denoiser", "unet")
        if not self.recipe.get("loads_lora", True):
            raise LocogenError("this model's pipeline loads no LoRA: share the edit's own file, or export() the model")
        if style == "kohya" and denoiser != "unet":
            raise LocogenError("kohya-style names are those of U-Nets: take style='diffusers' for this model")
        if style == "kohya" and any(".add_" in name for name in self.changes):
            raise LocogenError("diffusers loads no kohya-style names for IF: take style='diffusers', the default")
        write_lora(Path(path), self.name, self.changes, style, denoiser)

    def export(self, pipe: Any, folder: str | Path, *, strength: float = 1.0) -> Path:
        """Write the whole pipeline with the edit merged, in diffusers' format; the pipeline itself stays as it is."""
        with self.applied(pipe, strength):
            pipe.save_pretrained(folder, safe_serialization=True)
        return Path(folder)

    def _repr_html_(self) -> str:
        size = sum(t.numel() * t.element_size() for c in self.changes.values() for t in (c.up, c.down))
        told = {
            "layers": ", ".join(map(str, self.layers)),
            "matrices": len(self.changes),
            "rank": max(c.rank for c in self.changes.values()),
            "relative change": f"{max(self.recipe['relative_change'].values()):.3f} at most" if self.recipe else "",
            "lost to rounding": f"{self.recipe['rounding']:.1e} of the change" if self.recipe else "",
            "size": f"{size / 1024:.0f} KB",
            "made for": self.recipe.get("model", ""),
        }
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in told.items())
        return f"<p><b>Edit</b> of {escape(self.name)}</p><table>{rows}</table>"


def undo_all(pipe: Any) -> None:
    """Take off every edit that is applied, also those whose name was given to another: the original bits come back."""
    take_all_off(denoiser_of(pipe))


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
    what the concept turns into, "a cat"; without it styles and objects go. `layers`: a window, or any ints.

    Options, see `Options`: `ridge` λ of keys (and of values, unless `ridge_v`): small follows the target, large
    keeps the weights. `tokens`, which states are edited (None: the family's, see below): "last_subject", where CLIP
    gathers the subject (the published choice); "subject", each of its tokens, for names of many; "end", the state
    after the prompt, for text towers that gather there; "all", every position, padding included, against the target's
    same position (TIME's choice: strong, and harmful to neighbors, unless λ is large and they are preserved).
    `preserve`: prompts whose states should go where they went, weighted by `preserve_weight` (UCE); with `null_space`,
    exactly. `ordinary`: captions whose covariance says which directions are dear (MEMIT). `entry`: edit also the map
    by which text enters beside or before the layers: SD-XL's `add_embedding` (the pooled vector), the
    `context_embedder` of SD 3 and FLUX; off by default.

    SD-XL: one state holds both encoders'. T5 hears both ways, so in IF, PixArt, SD 3 and FLUX each subject token is
    edited by default, and the other words still tell of it. IF: after each layer's norm. SD 3 and FLUX: the text side
    of joint blocks, as a short run of the prompt reads it on average (`readings.Reader`).

    Solved in float64 whatever the model's type. Raises `LocogenError` for empty or equal phrasings, a prompt without
    its subject, λ <= 0, a layer that is not there, and weights that are non-finite, quantized or carry LoRA.
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
    chosen = {name: value for name, value in options.items() if name != "tokens" or value is not None}
    chosen.setdefault("tokens", family_of(pipe).tokens)
    return _fit(pipe, " + ".join(c.name for c in concepts), told, layers, Options(**chosen))


def _fit(pipe: Any, name: str, told: Sequence[Phrasing], layers: Iterable[int], options: Options) -> Edit:
    family, denoiser = family_of(pipe), denoiser_of(pipe)
    chosen = _chosen(find_layers(pipe), layers)
    paths = {module: path for path, module in denoiser.named_modules()}
    places = [
        (layer, {m: f"{paths[module]}.weight" for m, module in family.matrices(layer.module).items()})
        for layer in chosen
    ]
    names = [n for _, by_matrix in places for n in by_matrix.values()]
    if options.entry:
        if family.entry is None:
            raise LocogenError(f"{family.name} has no map beside its layers that could be edited: leave out entry=True")
        names.append(f"{family.entry}.weight")
    weights = weights_of(denoiser, names)
    first = next(iter(weights.values()))
    fit = Fit(Reader(pipe, chosen), told, options, first.device if first.is_cuda else "cpu")
    changes: dict[str, solve.LowRank] = {}
    for layer, by_matrix in places:
        for m, n in by_matrix.items():
            changes[n] = fit.change(weights[n], layer, m)
    if options.entry:
        changes[names[-1]] = fit.change(weights[names[-1]], None, "k")
    recipe = _recipe(pipe, told, options, weights, changes)
    recipe |= {"denoiser": family.denoiser, "loads_lora": hasattr(pipe, "load_lora_weights")}
    return Edit(name, tuple(layer.index for layer in chosen), changes, digest_of(weights), recipe)


def _chosen(found: Sequence[Layer], layers: Iterable[int]) -> list[Layer]:
    if isinstance(layers, str) or not (wanted := tuple(dict.fromkeys(int(i) for i in layers))):
        raise LocogenError(f"layers is {layers!r}: give a window or the numbers of some of find_layers(pipe)")
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
        "revision": getattr(getattr(getattr(pipe, "text_encoder", None), "config", None), "_commit_hash", None),
        "dtype": sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()}),
        "relative_change": relative,
        "rounding": lost,
        "versions": {package: version(package) for package in ("locogen", "torch", "diffusers", "transformers")},
    }


def _model_name(pipe: Any) -> str:
    """The hub id, or the last two names of the folder: a shared file tells nothing of its maker's disk."""
    told = str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
    return "/".join(Path(told).parts[-2:])
