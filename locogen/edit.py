"""Edits: fit a closed-form change of some layers' key and value matrices, apply it, undo it, share it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locogen import solve
from locogen.errors import LocogenError
from locogen.families import denoiser_of, encode, end_position, family_of, subject_positions
from locogen.layers import find_layers
from locogen.patches import Patch, digest_of, put_on, take_off, weights_of
from locogen.phrasings import Phrasing, default_phrasings, own_phrasings
from locogen.plan import Concept, PromptPair

if TYPE_CHECKING:
    from torch import Tensor

Tokens = Literal["last_subject", "subject", "end", "all"]
TOKENS: tuple[Tokens, ...] = ("last_subject", "subject", "end", "all")
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
        return Patch(self.name, self.changes, self.digest)

    @contextmanager
    def applied(self, pipe: Any, strength: float = 1.0) -> Iterator[None]:
        """Within the context the model carries the edit, `strength` times; after it, its own weights, bit for bit."""
        self.apply_(pipe, strength)
        try:
            yield
        finally:
            self.undo_(pipe)

    def apply_(self, pipe: Any, strength: float = 1.0) -> None:
        """Add the edit to the model's weights, rounded once to their own type; all of it or nothing.

        Raises `LocogenError`, naming the difference, for a model that it was not made for, and when it is applied.
        """
        put_on(denoiser_of(pipe), self._patch, strength)

    def undo_(self, pipe: Any) -> None:
        """Take the edit off again: the original bits, where no other edit is left.

        Edits fitted on the same weights come off in any order; one fitted on top of others before those. Raises
        `LocogenError` otherwise, and when the edit is not applied.
        """
        take_off(denoiser_of(pipe), self._patch)

    def refit(self, pipe: Any, layers: Iterable[int] | None = None) -> Edit:
        """The same recipe on another model, or for other layers."""
        recipe = self.recipe
        told = [Phrasing(**p) for p in recipe["phrasings"]]
        return _fit(pipe, self.name, told, self.layers if layers is None else layers, Options(**recipe["options"]))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: factors in float64, everything else as metadata."""
        from safetensors.torch import save_file

        told = {"format": EDIT_FORMAT, "name": self.name, "layers": list(self.layers), "digest": self.digest}
        tensors = {f"{n}/{part}": getattr(c, part).contiguous() for n, c in self.changes.items() for part in _PARTS}
        metadata = {"locogen_edit": json.dumps(told | {"recipe": dict(self.recipe)})}
        _written(path, lambda partial: save_file(tensors, partial, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote. Raises `LocogenError` for a file that is cut short, another's, or of a later form."""
        told, tensors = _read(Path(path))
        if told.get("format") != EDIT_FORMAT:
            raise LocogenError(f"{path} is an edit of format {told.get('format')}, this locogen reads {EDIT_FORMAT}")
        names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        changes = {n: solve.LowRank(*(tensors[f"{n}/{part}"] for part in _PARTS)) for n in names}
        return cls(told["name"], tuple(told["layers"]), changes, told["digest"], told["recipe"])

    def to_lora(self, path: str | Path, *, style: Literal["diffusers", "kohya"] = "diffusers") -> None:
        """Write the edit as a LoRA that any tool loads, without loss: `pipe.load_lora_weights(path)`.

        The change has rank n by its algebra, so nothing is approximated; the factors are balanced, then rounded to
        float32. `style`: the names that diffusers (peft) uses, or those of kohya-style tools, which carry the rank
        as `alpha` so that the scale is 1.
        """
        import torch
        from safetensors.torch import save_file

        if style not in ("diffusers", "kohya"):
            raise LocogenError(f"style is {style!r}: take 'diffusers' or 'kohya'")
        tensors = {}
        for name, change in self.changes.items():
            even, module = change.balanced(), name.removesuffix(".weight")
            up, down = even.up.float().contiguous(), even.down.float().contiguous()
            if style == "diffusers":
                tensors |= {f"unet.{module}.lora_B.weight": up, f"unet.{module}.lora_A.weight": down}
            else:
                stem = "lora_unet_" + module.replace(".", "_")
                tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
                tensors[f"{stem}.alpha"] = torch.tensor(float(even.rank))
        _written(path, lambda partial: save_file(tensors, partial, {"format": "pt", "locogen": self.name}))

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
            "relative change": f"{max(self.recipe['relative_change'].values()):.3f} at most",
            "lost to rounding": f"{self.recipe['rounding']:.1e} of the change",
            "size": f"{size / 1024:.0f} KB",
            "made for": self.recipe.get("model", ""),
        }
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in told.items())
        return f"<p><b>Edit</b> of {escape(self.name)}</p><table>{rows}</table>"


@dataclass(frozen=True)
class Options:
    """How an edit is fitted; see `fit_edit`."""

    ridge: float = 0.01
    ridge_v: float | None = None
    tokens: Tokens = "last_subject"
    preserve: tuple[str, ...] = ()
    preserve_weight: float = 1.0
    null_space: bool = False
    ordinary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise LocogenError(f"tokens is {self.tokens!r}: take one of {', '.join(TOKENS)}")
        if self.null_space and not self.preserve:
            raise LocogenError("null_space keeps the preserved prompts exactly: give preserve= some prompts")
        if self.null_space and self.ordinary:
            raise LocogenError("null_space and ordinary are two ways to keep the rest: give one of them")
        for name in ("preserve", "ordinary"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


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
    keeps the weights. `tokens`, which states are edited: "last_subject", where CLIP gathers the subject (the
    published choice); "subject", each of its tokens, for names of many; "end", the state after the prompt, for text
    towers that gather there; "all", every position, padding included, against the target's same position (TIME's
    choice: strong, and harmful to neighbors). `preserve`: prompts whose states should go where they went, weighted
    by `preserve_weight` (UCE); with `null_space`, exactly. `ordinary`: captions whose covariance says which
    directions are dear (MEMIT).

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
    return _fit(pipe, " + ".join(c.name for c in concepts), told, layers, Options(**options))


_PARTS = ("up", "down")


def _fit(pipe: Any, name: str, told: Sequence[Phrasing], layers: Iterable[int], options: Options) -> Edit:
    family, found = family_of(pipe), find_layers(pipe)
    chosen = tuple(dict.fromkeys(int(i) for i in layers))
    if not chosen:
        raise LocogenError("there are no layers to edit: give a window or some of find_layers(pipe)")
    beyond = [i for i in chosen if not 0 <= i < len(found)]
    if beyond:
        raise LocogenError(f"layers {beyond} are not there: the model has 0 to {len(found) - 1}")
    names = {i: {m: f"{found[i].name}.to_{m}.weight" for m in family.matrices(found[i].module)} for i in chosen}
    weights = weights_of(denoiser_of(pipe), [n for by_matrix in names.values() for n in by_matrix.values()])
    source, target = (rows.to(next(iter(weights.values())).device) for rows in _states(pipe, told, options.tokens))
    downs = {"k": _down(pipe, source, options, options.ridge)}
    downs["v"] = downs["k"] if options.ridge_v is None else _down(pipe, source, options, options.ridge_v)
    changes = {}
    for m, down in downs.items():
        alike = [by_matrix[m] for by_matrix in names.values()]
        changes |= dict(zip(alike, solve.updates([weights[n] for n in alike], source, target, down), strict=True))
    changes = {n: solve.LowRank(c.up.cpu(), c.down.cpu()) for n, c in changes.items()}
    return Edit(name, chosen, changes, digest_of(weights), _recipe(pipe, told, options, weights, changes))


def _down(pipe: Any, source: Tensor, options: Options, ridge: float) -> Tensor:
    """The factor that all matrices of one λ share."""
    kept = _last_states(pipe, options.preserve, options.tokens).to(source.device) if options.preserve else None
    if options.null_space and kept is not None:
        return solve.null_space_reader(source, kept, ridge=ridge)
    covariance = ordinary_covariance(pipe, options.ordinary).to(source.device) if options.ordinary else None
    return solve.reader(
        source, ridge=ridge, preserve=kept, preserve_weight=options.preserve_weight, covariance=covariance
    )


def ordinary_covariance(pipe: Any, captions: Iterable[str]) -> Tensor:
    """The covariance of the text states of ordinary captions, start mark and padding left out, (width, width)."""
    gathered = None
    for caption in captions:
        states = _encode(pipe, caption)[1 : end_position(pipe, caption) + 1]
        gathered = (gathered or solve.Covariance(states.shape[1])).add(states)
    if gathered is None:
        raise LocogenError("there are no ordinary captions: give at least one")
    return gathered.matrix()


def _encode(pipe: Any, prompt: str) -> Tensor:
    return encode(pipe, [prompt]).states[0].double()


def _states(pipe: Any, told: Sequence[Phrasing], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Source and target states of every phrasing, (rows, width) each."""
    import torch

    source, target = [], []
    for phrasing in told:
        old, new = _encode(pipe, phrasing.source), _encode(pipe, phrasing.target)
        places = subject_positions(pipe, phrasing.source, phrasing.subject)
        end = end_position(pipe, phrasing.target)
        if tokens == "all":
            old, new = old[1:], new[1:]
        elif tokens == "end":
            old, new = old[[end_position(pipe, phrasing.source)]], new[[end]]
        else:
            old = old[list(places)] if tokens == "subject" else old[[places[-1]]]
            new = new[[end - 1]].expand_as(old)  # the target's last word
        source.append(old)
        target.append(new)
    return torch.cat(source), torch.cat(target)


def _last_states(pipe: Any, prompts: Iterable[str], tokens: Tokens) -> Tensor:
    """States of prompts that should stay, at the places that `tokens` edits in a source, (rows, width)."""
    import torch

    rows = []
    for prompt in prompts:
        states, end = _encode(pipe, prompt), end_position(pipe, prompt)
        rows.append({"end": states[[end]], "all": states[1:], "subject": states[1:end]}.get(tokens, states[[end - 1]]))
    return torch.cat(rows)


def _recipe(
    pipe: Any,
    told: Sequence[Phrasing],
    options: Options,
    weights: Mapping[str, Tensor],
    changes: Mapping[str, solve.LowRank],
) -> dict[str, Any]:
    relative, lost = {}, 0.0
    for name, weight in weights.items():
        old, change = weight.detach().double().cpu(), changes[name].change
        relative[name] = float(change.norm() / old.norm())
        rounded = (old + change).to(weight.dtype).double()
        lost = max(lost, float((rounded - old - change).norm() / change.norm().clamp_min(1e-300)))
    return {
        "phrasings": [vars(p) for p in told],
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()},
        "model": _model_name(pipe),
        "dtype": sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()}),
        "relative_change": relative,
        "rounding": lost,
        "versions": {package: version(package) for package in ("locogen", "torch", "diffusers", "transformers")},
    }


def _model_name(pipe: Any) -> str:
    """The hub id, or the last two names of the folder: a shared file tells nothing of its maker's disk."""
    told = str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
    return "/".join(Path(told).parts[-2:])


def _written(path: str | Path, write: Any) -> None:
    """Write a file whole or not at all."""
    import os

    from safetensors import SafetensorError

    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise LocogenError(f"{path} cannot be written ({error}): give another place") from None
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["locogen_edit"])
            return told, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise LocogenError(f"there is no edit {path}: give the file that Edit.save wrote") from None
    except KeyError:
        raise LocogenError(f"{path} is no edit of locogen's: give the file that Edit.save wrote") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LocogenError(f"{path} is cut short or damaged ({error}): save the edit again") from None
