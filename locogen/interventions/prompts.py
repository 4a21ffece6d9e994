"""The hook contexts: change or record the text that each layer gets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, Rows, active_contexts, on_denoiser
from locogen.interventions.encoding import COPIES, Encoding
from locogen.interventions.indices import index_on
from locogen.models.families import (
    Family,
    check_lengths,
    denoiser_of,
    family_of,
    missing_encoders,
    text_encoders,
)
from locogen.models.hooks import (
    Hook,
    Registered,
    after,
    before,
    named_arguments,
    with_arguments,
)
from locogen.models.layers import Layer, find_layers, select
from locogen.plan import Intervention, missing_target_runs
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from locogen.models.text import PromptEncoding

__all__ = [
    "active_contexts",
    "foreign_hooks",
    "generators",
    "intervene",
    "intervene_encoded",
    "record",
]

PLANS_PROMPTS = "call the pipeline with exactly the plan's prompts, [row.prompt for row in plan]"
# Of SD-XL, SD 3, FLUX and HiDream: for their other text encoders.
OTHER_PROMPTS = ("prompt_2", "prompt_3", "prompt_4")
ENCODED = (
    *("prompt_embeds", "pooled_prompt_embeds"),
    *("prompt_attention_mask", "prompt_embeds_mask"),
    *("prompt_embeds_t5", "prompt_embeds_llama3"),
)
TOLERANCE = {"float64": 1e-4, "float32": 1e-4}  # of encodings in batches of other sizes, relative
HALF_TOLERANCE = 3e-2


@contextmanager
def intervene(
    pipe: Pipeline,
    plan: Sequence[Intervention],
    *,
    targets: PromptEncoding | None = None,
    rows: Rows | None = None,
) -> Iterator[None]:
    """Let the layers of row `i` of a pipeline call get the target of `plan[i]`, not its prompt.

    The call itself stays yours: `pipe([row.prompt for row in plan], ...)` with the plan's prompts
    in the plan's order, any guidance, any `num_images_per_prompt`, and any other argument. The
    negative half of guidance is never touched, a plan without layers leaves the pictures bit for
    bit as they were, and a plan with all layers gives the target's own pictures. A `prompt_2` or
    `prompt_3` that repeats the prompt is exchanged with it; any other text there stays.

    A call may bring `prompt_embeds` in place of prompts. If the pipeline has its text encoders,
    they must be what it makes of the plan's prompts. Text that was encoded in another way needs a
    pipeline without text encoders (`pipe.text_encoder = None`), and targets that were encoded in
    the same way: then nothing says whether it is the plan's.

    Args:
        pipe: The pipeline. Calls of other pipelines that share its denoiser are not touched.
        plan: One row for each prompt of the call. SD 3 and FLUX also need the targets' own runs in
            it: `with_target_runs(plan)`.
        targets: The targets' text, encoded, a row for each row of the plan. Left out, they are
            encoded within the call, as its prompts are. Needed if the pipeline has no text
            encoder, or with `rows`.
        rows: For a loop of your own, or a modular pipeline, which call the denoiser themselves:
            which rows of each call are the plan's. A range; a function of the call's arguments by
            name that returns one; or the plan's prompts as you encoded them, whose rows are found
            by their values. `pipe` may then be the bare denoiser, and what the loop hands over is
            not compared with the plan.

    Returns:
        A context manager. A compiled denoiser runs uncompiled within it.

    Raises:
        LocogenError: The model does not have a layer of the plan, the call has other prompts than
            the plan or in another order, a callback exchanges its prompts, the targets' own runs
            are missing, pooled="target" for a model without pooled text, a layer was added since,
            or a layer was not called.
        UnsupportedModel: The family is unknown.

    Example:
        >>> pipe = load("mini")
        >>> prompt, target = "a house in the style of van gogh", "a house"
        >>> plan = [Intervention(prompt, target, layers=(8, 9), seed=1)]
        >>> prompts = [row.prompt for row in plan]
        >>> with intervene(pipe, plan):
        ...     output = pipe(prompts, generator=generators(plan), num_inference_steps=2)
        >>> output.images[0].size
        (64, 64)
    """
    with _intervening(pipe, plan, targets, are_plans_prompts=False, rows_of_calls=rows):
        yield


@contextmanager
def intervene_encoded(
    pipe: Pipeline, plan: Sequence[Intervention], targets: PromptEncoding
) -> Iterator[None]:
    """As `intervene`, for a caller that has encoded the plan's prompts itself with this pipeline.

    They are not encoded a second time to compare.
    """
    with _intervening(pipe, plan, targets, are_plans_prompts=True):
        yield


@contextmanager
def _intervening(
    pipe: Pipeline,
    plan: Sequence[Intervention],
    targets: PromptEncoding | None,
    *,
    are_plans_prompts: bool,
    rows_of_calls: Rows | None = None,
) -> Iterator[None]:
    rows = list(plan)
    family = family_of(pipe)
    layers = find_layers(pipe)
    _check_plan(rows, layers, family)
    check_lengths(pipe, [(row.prompt, row.target) for row in rows if row.layers])
    # Where text changes from block to block together with the picture, only a run of the target has
    # the target's text at a layer: its keys and values are taken (patching, arXiv 2502.09935).
    # Elsewhere the encoded target is all that a layer would read of it (Basu et al. 2024, arXiv
    # 2405.01008, section 4).
    exchange_of = _Patched if family.joint_attention else _Replaced
    if not family.joint_attention and targets is None:
        _check_somebody_encodes(pipe, rows_of_calls)

    def hooks_for(call: Call) -> list[Hook]:
        exchange = exchange_of(call, rows, targets, are_plans_prompts)
        call.keeps_prompts = True
        call.on_encoded = exchange.encode
        call.on_prompts = exchange.check
        hooks: list[Hook] = []
        if any(row.pooled == "target" for row in rows) and family.pooled is not None:
            hooks += family.pooled(denoiser_of(pipe, family), exchange.pooled)
        # No hook where nothing is exchanged: then a plan without layers is the plain pipeline.
        for index in _exchanged_layers(rows):
            hooks += exchange.at(layers[index])
        return hooks

    with on_denoiser(pipe, hooks_for, f"intervene {_described(rows, targets)}", rows_of_calls):
        yield


def _exchanged_layers(rows: Sequence[Intervention]) -> list[int]:
    return sorted(set().union(*(row.layers for row in rows)))


def _described(rows: Sequence[Intervention], targets: PromptEncoding | None) -> str:
    """What of a plan makes the picture, for its key."""
    parts: list[Any] = [(row.target, row.layers, row.timesteps, row.pooled) for row in rows]
    if targets is not None:
        parts.append([_digest(state) for state in targets.states])
    return repr(parts)


def _digest(state: Tensor) -> str:
    return hashlib.sha256(state.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def _check_somebody_encodes(pipe: Pipeline, rows_of_calls: Rows | None) -> None:
    if rows_of_calls is not None:
        raise LocogenError(
            "with rows= nobody encodes the targets: give them to intervene(pipe, plan, "
            "targets=…), encoded as the prompts of your loop are"
        )
    if not text_encoders(pipe):
        raise LocogenError(
            "the pipeline has no text encoder to encode the targets with: give the encoded targets "
            "to intervene(pipe, plan, targets=…), encoded in the same way as the call's prompts"
        )


def _check_plan(rows: Sequence[Intervention], layers: Sequence[Layer], family: Family) -> None:
    if not rows:
        raise LocogenError("the plan is empty: give intervene at least one row")
    for row in rows:
        if row.layers:
            select(layers, row.layers)
        if row.pooled == "target" and family.pooled is None:
            raise LocogenError(
                f"{family.name} reads text in its layers only: leave out pooled='target'"
            )
    missing = missing_target_runs(rows) if family.joint_attention else ()
    if missing:
        raise LocogenError(
            f"{family.name} takes a target from the target's own run, and the plan has no run of "
            f"{missing[0].target!r} with seed {missing[0].seed}: use plan = "
            "with_target_runs(plan), its prompts and its generators"
        )


# --- what a call of the denoiser gets ------------------------------------------------------------


@dataclass(eq=False)
class _Exchange:
    """Puts targets in the place of prompts, in the denoiser's call in progress."""

    call: Call
    plan: Sequence[Intervention]
    targets: PromptEncoding | None  # as the caller encoded them, one a row of the plan
    are_plans_prompts: bool  # whether the caller has encoded the plan's prompts itself
    encoded: PromptEncoding | None = None  # the targets as this call encodes them, before guidance
    plans_prompts: WeakKeyDictionary[Encoding, PromptEncoding] = field(
        default_factory=WeakKeyDictionary
    )  # the plan's prompts encoded in the same way, where a call brought encoded ones instead

    def encode(self, encoding: Encoding) -> None:
        """Take note of an encoding within `pipe(…)`: now texts can be encoded in the same way."""
        # Which text `prompt_embeds` are cannot be read from them: only encoding the plan's prompts
        # shows it. Here and not in `check`: there the denoiser has taken the encoders' place on a
        # device that model offload shares among them.
        is_unknown = encoding.prompts is None and not self.are_plans_prompts
        if is_unknown and not missing_encoders(self.call.pipe):
            prompts = [row.prompt for row in self.plan]
            self.plans_prompts[encoding] = self._encoded_alike(encoding, prompts)

    def _encoded_alike(self, encoding: Encoding, texts: Sequence[str]) -> PromptEncoding:
        """Texts, one a row of the plan, encoded with the call's arguments, such as `clip_skip`."""
        prompts = encoding.prompts or []
        copies, rest = divmod(len(prompts), len(self.plan))
        changes: dict[str, Any] = dict.fromkeys(ENCODED)
        changes["do_classifier_free_guidance"] = False  # the negative text is not exchanged
        if rest or not prompts:  # several rows of the plan are pictures of one prompt
            changes |= dict.fromkeys(COPIES, 1)
            copies = 1
        changes["prompt"] = _each_repeated(texts, copies)
        for name in OTHER_PROMPTS:
            other_texts = encoding.arguments.get(name)
            changes[name] = _other_targets(other_texts, prompts, changes["prompt"])
        encoded = self.call.family.encoding_of(encoding.again(**changes))

        # A call that brings `prompt_embeds` need not say to which length they were padded or cut.
        length = encoding.arguments.get("max_sequence_length")
        tokens_of_prompts = self.call.family.encoding_of(encoding.returned).states.shape[1]
        tokens = encoded.states.shape[1]
        if length is None or tokens_of_prompts == tokens:
            return encoded
        ahead = max(tokens - length, 0)  # SD 3's T5 stands behind its CLIPs, which have one length
        if tokens_of_prompts <= ahead:
            return encoded
        changes["max_sequence_length"] = tokens_of_prompts - ahead
        return self.call.family.encoding_of(encoding.again(**changes))

    def check(self, encoding: Encoding) -> None:
        """The call must have the plan's prompts, each as often as pictures are made of it."""
        encoded = self.call.family.encoding_of(encoding.returned)
        all_states = encoded.states.flatten(2)
        count = len(all_states)
        if count % len(self.plan):
            raise LocogenError(
                f"the denoiser is called with {count} conditional rows, and the plan has "
                f"{len(self.plan)}: {PLANS_PROMPTS}"
            )
        each = count // len(self.plan)
        if encoded.mask is not None and each > 1:
            self._check_masks(encoded.mask.unflatten(0, (len(self.plan), each)))
        if encoding.prompts is None:
            states = all_states.unflatten(0, (len(self.plan), each))
            self._check_states(states, self.plans_prompts.get(encoding))
            return
        prompts = _each_repeated(encoding.prompts, encoding.pictures_per_prompt)
        for place, prompt in enumerate(prompts):
            planned = self.plan[place // each].prompt
            if prompt != planned:
                self._check_list_is_new(place // each, prompt, planned)
                raise LocogenError(
                    f"prompt {place // each} of the call is {prompt!r}, and the plan has "
                    f"{planned!r} there: {PLANS_PROMPTS}"
                )

    def _check_list_is_new(self, place: int, prompt: str, planned: str) -> None:
        """Name the cause where an earlier call wrote its template into the list of prompts."""
        write = self.call.family.written_into_list
        if write is None:
            return
        pipe = self.call.pipe
        written = planned
        while len(written) < len(prompt):  # once for each earlier call
            written = write(pipe, written)
        if written == prompt:
            raise LocogenError(
                f"prompt {place} of the call is the plan's {planned!r} in the pipeline's chat "
                f"template, which {type(pipe).__name__} wrote into the list in an earlier call: "
                "make the list anew, and give a copy to each call, pipe(list(prompts), …)"
            )

    def _check_masks(self, masks: Tensor) -> None:
        """All pictures of a prompt must have its mask, (plan rows, pictures of each, tokens)."""
        # Diffusers 0.42 repeats masks of Qwen-Image and Lumina 2 in another order than their texts.
        if not bool((masks == masks[:, :1]).all()):
            raise LocogenError(
                f"{type(self.call.pipe).__name__} gives several pictures of a prompt the masks of "
                "other prompts: make one of each (num_images_per_prompt=1), and repeat prompts and "
                "rows of the plan instead"
            )

    def _check_states(self, states: Tensor, plans_prompts: PromptEncoding | None) -> None:
        """Prompts that the caller encoded must be the plan's, or be able to be.

        Args:
            states: (plan rows, pictures of each, tokens, width)
            plans_prompts: The plan's prompts, encoded in the same way; None: not known.
        """
        if states.shape[1] > 1 and not bool((states == states[:, :1]).all()):
            raise LocogenError(
                f"the call has {states.shape[0] * states.shape[1]} different prompts, and the plan "
                f"has {len(self.plan)} rows: {PLANS_PROMPTS}"
            )

        # Without an encoder it cannot be known which text states are. But equal prompts must have
        # equal states, and a prompt that is also a target must be encoded as that target is.
        # Different prompts may be equal: CLIP ignores case.
        by_prompt: dict[str, Tensor] = {}
        for row, state in zip(self.plan, states[:, 0], strict=True):
            earlier = by_prompt.setdefault(row.prompt, state)  # (tokens, width)
            if not _same_text(state, earlier):
                raise LocogenError(
                    f"the call's prompt_embeds differ in rows whose prompt is {row.prompt!r}: "
                    f"{PLANS_PROMPTS}"
                )
        if self.targets is not None:
            self._check_against_targets(by_prompt, self.targets)
        if plans_prompts is not None and not _same_text(
            states[:, 0], plans_prompts.states.flatten(2)
        ):
            raise LocogenError(
                "the call's prompt_embeds are not what the pipeline makes of the plan's prompts: "
                "call it with the prompts themselves. For text that was encoded in another way, "
                "set the pipeline's text encoders to None, encode the targets in that way too, and "
                "give them to intervene(pipe, plan, targets=…)"
            )

    def _check_against_targets(self, prompts: dict[str, Tensor], targets: PromptEncoding) -> None:
        for row, target in zip(self.plan, targets.states.flatten(2), strict=True):
            state = prompts.get(row.target)
            if state is not None and not _same_text(state, target.to(state)):
                raise LocogenError(
                    f"the call's prompt_embeds of {row.target!r} are not those of targets=: "
                    f"{PLANS_PROMPTS}"
                )

    def at(self, layer: Layer) -> list[Hook]:
        """The hooks that give a layer the targets."""
        raise NotImplementedError

    def pooled(self, rows: Tensor) -> Tensor:
        """The denoiser's pooled text, the targets' in rows that take it, (call rows, ...)."""
        raise NotImplementedError

    def rows_now(self, layer: int | None) -> list[int]:
        """Which rows of the plan take their target now, at a layer; None: by the pooled text."""
        if not self.call.rows:
            return []  # FLUX's call for the negative prompt
        if len(self.call.rows) % len(self.plan):
            raise LocogenError(
                f"{len(self.call.rows)} rows of the denoiser's call are said to be the plan's, "
                f"which has {len(self.plan)}: give as many, or a multiple, in the plan's order"
            )
        rows = []
        for i, row in enumerate(self.plan):
            takes_target = row.pooled == "target" if layer is None else layer in row.layers
            if takes_target and self._is_in_time(row):
                rows.append(i)
        return rows

    def _is_in_time(self, row: Intervention) -> bool:
        if row.timesteps is None:
            return True
        first, last = row.timesteps
        count = len(self.call.timesteps())
        if last >= count:
            raise LocogenError(f"there is no step {last}: the call has steps 0 to {count - 1}")
        return first <= self.call.step() <= last

    def places(self, plan_rows: Sequence[int]) -> Tensor:
        """Where rows of the plan stand in the call, all pictures of each: (places,)."""
        rows = self.call.rows  # negative rows, if any, are before them
        each = len(rows) // len(self.plan)
        places: list[int] = []
        for i in plan_rows:
            first = rows.start + i * each
            places += range(first, first + each)
        return index_on(self.call.states.device, places)


class _Replaced(_Exchange):
    """The targets' encoding takes the place of the prompts', just before each layer reads it."""

    def encode(self, encoding: Encoding) -> None:
        super().encode(encoding)
        if self.targets is not None:
            self.encoded = self.targets
        else:
            self.encoded = self._encoded_alike(encoding, [row.target for row in self.plan])

    def at(self, layer: Layer) -> list[Hook]:
        # Before the layer and not before the denoiser: so each layer can get another text, while
        # the pooled text and whatever else the denoiser makes of its argument stay the prompt's.
        def hook(
            module: Module, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]] | None:
            import torch

            rows = self.rows_now(layer.index)
            if not rows:
                return None
            arguments = named_arguments(module, args, kwargs)
            states = arguments.get("encoder_hidden_states")  # (call rows, tokens, width)
            if not isinstance(states, torch.Tensor):
                raise LocogenError(
                    f"layer {layer.index} ({layer.name}) gets a {type(states).__name__} as text, "
                    "and locogen can replace one tensor only: leave this layer out of the plan"
                )
            places = self.places(rows).to(states.device)
            changed = {"encoder_hidden_states": _with_rows(states, self._projected(), places)}
            # Another text has another length: without its mask a target would be read as long as
            # the prompt is.
            if self._targets().mask is not None and arguments.get("attention_mask") is not None:
                bias = _with_rows(arguments["attention_mask"], self._mask_bias(states), places)
                changed["attention_mask"] = bias  # (call rows, 1, tokens)
            return with_arguments(module, args, kwargs, changed)

        return [before(layer.module, hook, layer.label)]

    def pooled(self, rows: Tensor) -> Tensor:
        plan_rows = self.rows_now(None)
        if not plan_rows:
            return rows
        vectors = self._targets().pooled
        # DeepFloyd's U-Net pools the states themselves.
        other = self._states() if vectors is None else self._in_every_row(rows, vectors)
        return _with_rows(rows, other, self.places(plan_rows))

    def _targets(self) -> PromptEncoding:
        if self.call.rows_of is not None:  # no pipeline's encoder was followed
            self.encoded = self.targets
        if self.encoded is None:
            raise LocogenError(
                "the pipeline's call began before this context was opened: open it before you call "
                "the pipeline"
            )
        return self.encoded

    def _in_every_row(self, argument: Tensor, targets: Tensor) -> Tensor:
        """An argument of the denoiser, the targets' in every conditional row, (call rows, ...)."""
        if argument.shape[1:] != targets.shape[1:]:
            raise LocogenError(
                f"the model reads text of shape {tuple(argument.shape[1:])}, and the targets have "
                f"{tuple(targets.shape[1:])}: encode prompts and targets with the same tokenizer "
                "length"
            )
        places = self.places(range(len(self.plan)))
        return argument.index_copy(0, places, _repeated(targets, len(places)).to(argument))

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Made at its first use in a call: then the denoiser is where it computes, if offloaded."""
        if name not in self.call.cache:
            self.call.cache[name] = make()
        return self.call.cache[name]

    def _states(self) -> Tensor:
        """The denoiser's text, the targets' in conditional rows, (call rows, tokens, width)."""
        states = self.call.states
        return self._once("states", lambda: self._in_every_row(states, self._targets().states))

    def _projected(self) -> Tensor:
        """The same as the layers get it, (call rows, tokens, width of the layers)."""
        # The denoiser projects all rows at once, as in the target's own run: so the bits are the
        # same.
        project = self.call.family.project_states
        denoiser = self.call.denoiser
        return self._once("projected", lambda: project(denoiser, self._states()))

    def _mask_bias(self, states: Tensor) -> Tensor:
        """What attention adds for the targets' mask, (call rows, 1, tokens)."""
        argument = self.call.arguments["encoder_attention_mask"]  # (call rows, tokens)

        def bias() -> Tensor:
            mask = self._targets().mask
            assert mask is not None
            # As diffusers makes it of a mask: 0 where a token is read, -10000 where it is not.
            return (1 - self._in_every_row(argument, mask).to(states)).unsqueeze(1) * -10000.0

        return self._once("bias", bias)


class _Patched(_Exchange):
    """The keys and values of the targets' own runs take the place of the rows' own."""

    def check(self, encoding: Encoding) -> None:
        super().check(encoding)
        prompts = encoding.prompts or []
        if len(prompts) != len(self.plan):
            return
        for name in OTHER_PROMPTS:
            texts = encoding.arguments.get(name)
            if texts is not None and not isinstance(texts, str):
                self._check_other_prompts(name, prompts, texts)

    def _check_other_prompts(self, name: str, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """A row and its target's own run must differ in the prompt alone, or repeat it."""
        replaced = [i for i, row in enumerate(self.plan) if not row.is_plain]
        for row, target_run in zip(replaced, self._target_runs(replaced), strict=True):
            both_repeat = texts[row] == prompts[row] and texts[target_run] == prompts[target_run]
            if texts[row] != texts[target_run] and not both_repeat:
                raise LocogenError(
                    f"{name} of {prompts[row]!r} is {texts[row]!r}, and that of its target's own "
                    f"run is {texts[target_run]!r}: give both rows the same text, or each its "
                    "prompt"
                )

    def at(self, layer: Layer) -> list[Hook]:
        if getattr(layer.module, "fused_projections", False):
            raise LocogenError(
                "the model's projections are fused: call pipe.unfuse_qkv_projections() first"
            )
        # After the matrices and not before the layer: queries stay the row's own, and so does the
        # text that the block hands on.
        family = self.call.family
        columns = family.columns(layer.module)
        hooks: list[Hook] = []
        for name, matrix in family.matrices(layer.module).items():
            patch = self._patch(layer, columns[name])
            hooks.append(after(matrix, patch, f"to_{name} of {layer.label}"))
        if family.layer_mask is not None:
            hooks.append(
                before(layer.module, self._mask_patch(layer, family.layer_mask), layer.label)
            )
        return hooks

    def _patch(self, layer: Layer, columns: slice) -> Callable[..., Tensor | None]:
        def hook(module: Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            rows = self.rows_now(layer.index)
            if not rows:
                return None
            # Where text and picture are one sequence, the picture stays the row's own.
            tokens = self.call.text_tokens(layer)
            places = self.places(rows)
            source = self.places(self._target_runs(rows))
            patch = output[source, tokens, columns]  # (patched rows, tokens, channels)
            is_text = self.call.is_text(layer)  # (call rows, tokens, 1)
            if is_text is not None:
                self._check_alike(rows, is_text[places], is_text[source])
                patch = patch.where(is_text[places], output[places, tokens, columns])
            changed = output.clone()  # (call rows, tokens, channels)
            changed[places, tokens, columns] = patch
            return changed

        return hook

    def _check_alike(self, rows: Sequence[int], is_text: Tensor, of_targets: Tensor) -> None:
        """The texts of rows and of their targets' own runs must be equally long."""
        key = f"rows that are as long as their targets: {rows}"
        answers = self.call.of_mask()
        if key not in answers:  # once for layers that change the same rows
            answers[key] = bool((is_text == of_targets).all())
        if not answers[key]:
            raise LocogenError(
                f"in {self.call.family.name} the picture stands behind the text, and rows of this "
                "call have texts of other lengths than their targets: use prompts and targets of "
                "as many tokens, and one picture of each (num_images_per_prompt=1)"
            )

    def _mask_patch(self, layer: Layer, name: str) -> Callable[..., Any]:
        """Before a layer: the tokens that attention reads are the target's, as its text is."""

        def hook(module: Module, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = named_arguments(module, args, kwargs).get(name)  # (call rows, ...)
            rows = self.rows_now(layer.index)
            if mask is None or not rows:
                return None
            source = self.places(self._target_runs(rows))
            changed = mask.index_copy(0, self.places(rows), mask[source])
            return with_arguments(module, args, kwargs, {name: changed})

        return hook

    def pooled(self, rows: Tensor) -> Tensor:
        plan_rows = self.rows_now(None)
        if not plan_rows:
            return rows
        source = self.places(self._target_runs(plan_rows))
        return rows.index_copy(0, self.places(plan_rows), rows[source])

    def _target_runs(self, plan_rows: Sequence[int]) -> list[int]:
        """For each of some rows, the row of the plan that is its target's own run."""
        plain = {(row.prompt, row.seed): i for i, row in enumerate(self.plan) if row.is_plain}
        return [plain[self.plan[i].target, self.plan[i].seed] for i in plan_rows]


def _other_targets(texts: Any, prompts: Sequence[str], targets: Sequence[str]) -> Any:
    """What another encoder gets for a target: the target if it got the prompt, else its text."""
    if texts is None:
        return None
    as_list = [texts] if isinstance(texts, str) else list(texts)
    if as_list == list(prompts):
        return list(targets)
    # Another text is not the prompt's: it stays, as often as there are targets for it.
    return _each_repeated(as_list, len(targets) // len(as_list))


def _each_repeated(texts: Sequence[str], times: int) -> list[str]:
    return [text for text in texts for _ in range(times)]


def _same_text(one: Tensor, other: Tensor) -> bool:
    """Whether two encodings are of one text, to the rounding of batches of other sizes."""
    longest = max(one.shape[-2], other.shape[-2])
    one, other = (_padded(states, longest) for states in (one, other))
    if one.shape != other.shape:
        return False
    # Sums over a batch of another size may be taken in another order: equal texts then differ in
    # their last digits, and different ones by far more.
    tolerance = TOLERANCE.get(str(one.dtype).removeprefix("torch."), HALF_TOLERANCE)
    largest = (one - other).abs().max()
    return bool(largest <= tolerance * other.abs().max())


def _padded(states: Tensor, tokens: int) -> Tensor:
    """States with zeros behind them, as pipelines pad shorter ones, (..., tokens, width)."""
    from torch.nn.functional import pad

    missing = tokens - states.shape[-2]
    return pad(states, (0, 0, 0, missing)) if missing else states


def _repeated(encoding: Tensor, count: int) -> Tensor:
    """Each row as often as there are pictures of it, (count, ...)."""
    return encoding.repeat_interleave(count // len(encoding), dim=0)


def _with_rows(tensor: Tensor, other: Tensor, places: Tensor) -> Tensor:
    """A copy of a tensor with some rows of another one of the same shape, (call rows, ...)."""
    return tensor.index_copy(0, places, other[places].to(tensor))


# --- look at a model -----------------------------------------------------------------------------


@contextmanager
def record(pipe: Pipeline, *, rows: Rows | None = None) -> Iterator[dict[int, list[Tensor]]]:
    """Collect the text that each layer gets in calls of the pipeline.

    Opened inside `intervene`, it collects the exchanged text, except in SD 3 and FLUX, where keys
    and values are exchanged and not the text.

    Args:
        pipe: The pipeline.
        rows: As for `intervene`: then calls of the denoiser by anybody are recorded, all rows.

    Returns:
        A context manager, which yields {layer index: [(rows, tokens, width) at each call of the
        denoiser]}: copies, detached, on their own device.

    Raises:
        LocogenError: A layer was not called.
        UnsupportedModel: The family is unknown.

    Example:
        >>> pipe = load("mini")
        >>> with record(pipe) as texts:
        ...     output = pipe("a house", num_inference_steps=2, guidance_scale=1.0)
        >>> len(texts[8])  # one a step
        2
    """
    layers = find_layers(pipe)
    texts: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}

    def collecting(call: Call, layer: Layer) -> Hook:
        def hook(module: Module, args: Any, kwargs: dict[str, Any]) -> None:
            name = call.family.layer_states if layer.joined else call.family.layer_text
            states = named_arguments(module, args, kwargs)[name][:, call.text_tokens(layer)]
            is_text = call.is_text(layer)
            if is_text is not None:
                states = states * is_text  # zeros behind shorter texts
            texts[layer.index].append(states.detach().clone())  # (rows, tokens, width)

        return before(layer.module, hook, layer.label)

    def hooks_for(call: Call) -> list[Hook]:
        return [collecting(call, layer) for layer in layers]

    with on_denoiser(pipe, hooks_for, rows=rows):
        yield texts


def foreign_hooks(pipe: Pipeline) -> tuple[str, ...]:
    """Names of modules that carry other programs' forward hooks, whose effect no key can hold.

    Those of transformers do not count: left behind to collect hidden states (SD-XL, SD 3), they
    change nothing. Hooks of locogen that were copied with their module are somebody else's.
    """
    foreign = []
    for part, component in pipe.components.items():
        if not hasattr(component, "named_modules"):
            continue
        for name, module in component.named_modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(_is_foreign(hook, module) for hook in hooks):
                foreign.append(f"{part}.{name}")
    return tuple(foreign)


def _is_foreign(hook: Any, module: Module) -> bool:
    if isinstance(hook, Registered):
        return hook.hook.module is not module
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


def generators(plan: Sequence[Intervention]) -> list[torch.Generator]:
    """Make one CPU generator a row, seeded with its seed: the same noise on every device.

    In half precision torch 2.6 draws other numbers than in float32, and than torch 2.13 does.

    Args:
        plan: The rows.

    Returns:
        A generator for each row, in order: the `generator=` of a pipeline call.

    Example:
        >>> plan = [Intervention("a house", "a house", seed=seed) for seed in (3, 4)]
        >>> [generator.initial_seed() for generator in generators(plan)]
        [3, 4]
    """
    import torch

    return [torch.Generator("cpu").manual_seed(row.seed) for row in plan]
