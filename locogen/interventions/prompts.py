"""The hook contexts: change or record what each layer hears, then leave the model as found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, active_contexts, on_denoiser
from locogen.interventions.encoding import Encoding
from locogen.interventions.indices import index_on
from locogen.models.families import Family, denoiser_of, family_of
from locogen.models.hooks import Hook, Registered, after, before
from locogen.models.layers import Layer, find_layers
from locogen.plan import Intervention, riders

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from locogen.models.text import Text

__all__ = ["active_contexts", "foreign_hooks", "generators", "intervene", "record"]

PLANS_PROMPTS = "call the pipeline with exactly the plan's prompts, [row.prompt for row in plan]"
OTHER_PROMPTS = ("prompt_2", "prompt_3")  # of SD-XL, SD 3 and FLUX: for their other text encoders
ENCODED = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
TOLERANCE = {"float64": 1e-4, "float32": 1e-4}  # of encodings in batches of other sizes, relative
HALF_TOLERANCE = 3e-2


@contextmanager
def intervene(
    pipe: Any, plan: Sequence[Intervention], *, targets: Text | None = None
) -> Iterator[None]:
    """Within the context, row `i` of a pipeline call follows `plan[i]`: its layers hear its target.

    The call itself stays the user's: `pipe([row.prompt for row in plan], ...)` with the plan's prompts in
    the plan's order, any guidance, any `num_images_per_prompt`, and any other argument. The targets are
    encoded within that call, with its own arguments (`clip_skip`, a LoRA's scale, ...) and prompts
    exchanged: replacing all layers is the target's own run. A `prompt_2` or `prompt_3` that repeats the
    prompt is exchanged with it; another text there stays what it is, as it would in the target's own run.

    The negative half of guidance, or the separate negative call, is never touched (Basu et al. 2024,
    section 4: the conditional part only). A plan without layers leaves the call bit for bit as it was.
    Calls of other pipelines that share the denoiser are not touched. A compiled denoiser runs without its
    compiled code within the context, since that passes hooks by.

    Where text changes from block to block (SD 3, FLUX), a layer hears a target by the keys and values that
    the target's own run has there and then (patching, arXiv 2502.09935). That run rides along in the batch:
    the plan must hold it, as `with_riders(plan)` does.

    Args:
        pipe: The pipeline.
        plan: One row for each prompt of the call.
        targets: The targets' text, where it is encoded already; needed where the call is given
            `prompt_embeds` that are not the pipeline's own encoding of the plan's prompts.

    Raises:
        LocogenError: The model does not have a layer of the plan, the call has other prompts than the plan,
            in another order or number, targets do not ride along where they must, pooled="target" where
            there is no pooled path, a layer was not called, or text reaches the layers in a form that
            cannot be exchanged.
        UnsupportedModel: The family is unknown.
    """
    rows = list(plan)
    family = family_of(pipe)
    layers = find_layers(pipe)
    _check_plan(rows, len(layers), family)
    exchange_of = _Patched if family.evolves else _Replaced
    if not family.evolves and targets is None:
        _check_encoder(pipe)

    def hooks_for(call: Call) -> list[Hook]:
        exchange = exchange_of(call, rows, targets)
        call.on_encoded = exchange.encode
        call.on_prompts = exchange.check
        hooks = []
        if any(row.pooled == "target" for row in rows) and family.pooled is not None:
            hooks += family.pooled(denoiser_of(pipe, family), exchange.pooled)
        for layer in layers:
            if any(layer.index in row.layers for row in rows):
                hooks += exchange.at(layer)
        return hooks

    with on_denoiser(pipe, hooks_for, f"intervene {_described(rows, targets)}"):
        yield


def _described(rows: Sequence[Intervention], targets: Text | None) -> str:
    """What of a plan makes the picture, for its key."""
    parts: list[Any] = [(row.target, row.layers, row.timesteps, row.pooled) for row in rows]
    if targets is not None:
        parts.append([_digest(state) for state in targets.states])
    return repr(parts)


def _digest(state: Tensor) -> str:
    return hashlib.sha256(state.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def _check_encoder(pipe: Any) -> None:
    encoders = [name for name in pipe.components if name.startswith("text_encoder")]
    if all(pipe.components[name] is None for name in encoders):
        raise LocogenError(
            "the pipeline has no text encoder to encode the targets with: hand their text to "
            "intervene(pipe, plan, targets=…), encoded as the prompts of the call were"
        )


def _check_plan(rows: Sequence[Intervention], count: int, family: Family) -> None:
    if not rows:
        raise LocogenError("the plan is empty: give intervene at least one row")
    for row in rows:
        beyond = [i for i in row.layers if not 0 <= i < count]
        if beyond:
            raise LocogenError(
                f"layers {beyond} of {row.prompt!r} are not there: the model has 0 to {count - 1}"
            )
        if row.pooled == "target" and family.pooled is None:
            raise LocogenError(
                f"{family.name} hears text by its layers alone: leave out pooled='target'"
            )
    missing = riders(rows) if family.evolves else ()
    if missing:
        raise LocogenError(
            f"{family.name} hears a target from the target's own run, and that of {missing[0].target!r} with seed "
            f"{missing[0].seed} is not in the plan: take plan = with_riders(plan), its prompts and its generators"
        )


@dataclass(eq=False)
class _Exchange:
    """What the rows of a plan hear in place of their own text, in the denoiser's call in progress."""

    call: Call
    plan: Sequence[Intervention]
    targets: Text | None  # one row a row of the plan, as the caller encoded them
    text: Text | None = (
        None  # the targets' text as this call encodes it, its rows those of the call
    )

    def encode(self, encoding: Encoding) -> None:
        """Take note of an encoding within `pipe(…)`, where targets can be encoded in the same way."""

    def check(self, encoding: Encoding) -> None:
        """The pipeline's call must have the plan's prompts, each as often as pictures are made of it."""
        count = len(encoding.returned[0])
        if count % len(self.plan):
            raise LocogenError(
                f"the denoiser is called with {count} conditional rows, the plan has {len(self.plan)}: {PLANS_PROMPTS}"
            )
        each = count // len(self.plan)
        if encoding.prompts is None:
            self._check_encoded(encoding.returned[0].unflatten(0, (len(self.plan), each)))
            return
        prompts = [text for text in encoding.prompts for _ in range(encoding.pictures_per_prompt)]
        for place, prompt in enumerate(prompts):
            planned = self.plan[place // each].prompt
            if prompt != planned:
                raise LocogenError(
                    f"prompt {place // each} of the call is {prompt!r}, that of the plan is {planned!r}: "
                    f"{PLANS_PROMPTS}"
                )

    def _check_encoded(self, states: Tensor) -> None:
        """Of prompts that the caller encoded, (plan rows, pictures of each, tokens, width).

        Which text they are cannot be read off them: equal prompts must have equal states, and a prompt that is
        also a target must be encoded as that target is. Different prompts may be equal: CLIP ignores case.
        """
        if states.shape[1] > 1 and not bool((states == states[:, :1]).all()):
            raise LocogenError(
                f"the call has {states.shape[0] * states.shape[1]} different prompts, the plan has {len(self.plan)} "
                f"rows: {PLANS_PROMPTS}"
            )
        first: dict[str, Tensor] = {}
        for row, state in zip(self.plan, states[:, 0], strict=True):
            if row.prompt in first and not _same_text(state, first[row.prompt]):
                raise LocogenError(
                    f"the call's prompt_embeds differ in rows whose prompt is {row.prompt!r}: {PLANS_PROMPTS}"
                )
            first.setdefault(row.prompt, state)
        if self.targets is not None:
            self._check_against_targets(first, self.targets)

    def _check_against_targets(self, prompts: dict[str, Tensor], targets: Text) -> None:
        for row, target in zip(self.plan, targets.states, strict=True):
            state = prompts.get(row.target)
            if state is not None and not _same_text(state, target.to(state)):
                raise LocogenError(
                    f"the call's prompt_embeds of {row.target!r} are not those of targets=: {PLANS_PROMPTS}"
                )

    def rows_now(self, layer: int | None) -> list[int]:
        """Which rows of the plan hear their target now, at a layer; None: by the pooled path."""
        if not self.call.rows:
            return []
        if layer is None:
            replaced = [i for i, row in enumerate(self.plan) if row.pooled == "target"]
        else:
            replaced = [i for i, row in enumerate(self.plan) if layer in row.layers]
        return [i for i in replaced if self._in_time(self.plan[i])]

    def _in_time(self, row: Intervention) -> bool:
        if row.timesteps is None:
            return True
        first, last = row.timesteps
        if last >= len(self.call.timesteps()):
            raise LocogenError(
                f"step {last} is not there: the call has 0 to {len(self.call.timesteps()) - 1}"
            )
        return first <= self.call.step() <= last

    def places(self, plan_rows: Sequence[int]) -> Tensor:
        """Where rows of the plan stand in the call, all pictures of each: (places,)."""
        rows = self.call.rows
        each = len(rows) // len(self.plan)
        places = [rows.start + i * each + k for i in plan_rows for k in range(each)]
        return index_on(self.call.states.device, places)


class _Replaced(_Exchange):
    """The targets' encoding takes the place of the prompts', as the layers hear it."""

    def encode(self, encoding: Encoding) -> None:
        if self.targets is not None:
            self.text = self.targets
            return
        targets = [row.target for row in self.plan]
        self.text = self._encoded_alike(encoding, targets)
        if encoding.prompts is None:
            prompts = self._encoded_alike(encoding, [row.prompt for row in self.plan]).states
            if not _same_text(encoding.returned[0], _stretched(prompts, len(encoding.returned[0]))):
                raise LocogenError(
                    "the call's prompt_embeds are not what the pipeline makes of the plan's prompts: encode the "
                    "targets in the same way and hand them to intervene(pipe, plan, targets=…)"
                )

    def _encoded_alike(self, encoding: Encoding, texts: Sequence[str]) -> Text:
        """Texts, one a row of the plan, encoded with the arguments of the call."""
        prompts = encoding.prompts or []
        copies, rest = divmod(len(prompts), len(self.plan))
        changes: dict[str, Any] = dict.fromkeys(ENCODED)
        changes["do_classifier_free_guidance"] = False  # the negative text is not exchanged
        if rest or not prompts:  # several rows of the plan are pictures of one prompt
            changes["num_images_per_prompt"] = 1
            copies = 1
        changes["prompt"] = [text for text in texts for _ in range(copies)]
        for name in OTHER_PROMPTS:
            changes[name] = _exchanged(encoding.arguments.get(name), prompts, changes["prompt"])
        return self.call.family.text_of(encoding.again(**changes))

    def at(self, layer: Layer) -> list[Hook]:
        def hook(
            module: Any, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]] | None:
            import torch

            rows = self.rows_now(layer.index)
            if not rows:
                return None
            heard = kwargs.get("encoder_hidden_states")
            if not isinstance(heard, torch.Tensor):
                raise LocogenError(
                    f"layer {layer.index} ({layer.name}) hears {type(heard).__name__}, not one tensor"
                )
            places = self.places(rows).to(heard.device)
            changed = {**kwargs, "encoder_hidden_states": _moved(heard, self._heard(), places)}
            if self._text().mask is not None and kwargs.get("attention_mask") is not None:
                bias = _moved(kwargs["attention_mask"], self._unheard(heard), places)
                changed["attention_mask"] = bias
            return args, changed

        return [before(layer.module, hook, _named(layer))]

    def pooled(self, own: Tensor) -> Tensor:
        rows = self.rows_now(None)
        if not rows:
            return own
        pooled = self._text().pooled
        other = self._states() if pooled is None else self._all(own, pooled)
        return _moved(own, other, self.places(rows))

    def _text(self) -> Text:
        if self.text is None:
            raise LocogenError(
                "the pipeline's call began before this context was opened: open it before you call the pipeline"
            )
        return self.text

    def _all(self, own: Tensor, targets: Tensor) -> Tensor:
        """The denoiser's argument with the targets' text in every conditional row, (rows, ...)."""
        if own.shape[1:] != targets.shape[1:]:
            raise LocogenError(
                f"the model hears text of shape {tuple(own.shape[1:])}, the targets have {tuple(targets.shape[1:])}: "
                "encode prompts and targets with the same tokenizer length"
            )
        places = self.places(range(len(self.plan)))
        return own.index_copy(0, places, _stretched(targets, len(places)).to(own))

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Made at its first use in a call: then the denoiser is where it computes, offloaded or not."""
        made = self.call.made
        if name not in made:
            made[name] = make()
        return made[name]

    def _states(self) -> Tensor:
        return self._once("states", lambda: self._all(self.call.states, self._text().states))

    def _heard(self) -> Tensor:
        family = self.call.family
        denoiser = denoiser_of(self.call.pipe, family)
        return self._once("heard", lambda: family.heard(denoiser, self._states()))

    def _unheard(self, heard: Tensor) -> Tensor:
        """The bias of attention for the tokens that the targets' mask leaves out, as diffusers makes it of a mask."""
        own = self.call.given["encoder_attention_mask"]

        def bias() -> Tensor:
            mask = self._text().mask
            assert mask is not None
            return (1 - self._all(own, mask).to(heard)).unsqueeze(1) * -10000.0

        return self._once("bias", bias)


class _Patched(_Exchange):
    """The keys and values of the targets' own runs, in the same call, take the place of the rows' own."""

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
        for row, rider in zip(replaced, self._riding(replaced), strict=True):
            repeats = texts[row] == prompts[row] and texts[rider] == prompts[rider]
            if texts[row] != texts[rider] and not repeats:
                raise LocogenError(
                    f"{name} of {prompts[row]!r} is {texts[row]!r}, that of its target's own run is {texts[rider]!r}: "
                    "give both rows the same text, or their prompts"
                )

    def at(self, layer: Layer) -> list[Hook]:
        if getattr(layer.module, "fused_projections", False):
            raise LocogenError(
                "the model's projections are fused: call its unfuse_qkv_projections() first"
            )
        matrices = self.call.family.matrices(layer.module)
        patch = self._patch(layer)
        return [
            after(matrix, patch, f"to_{name} of {_named(layer)}")
            for name, matrix in matrices.items()
        ]

    def _patch(self, layer: Layer) -> Callable[..., Tensor | None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            rows = self.rows_now(layer.index)
            if not rows:
                return None
            tokens = self.call.states.shape[1] if layer.joined else output.shape[1]
            changed = output.clone()  # (rows, tokens, channels)
            source = self.places(self._riding(rows))
            changed[self.places(rows), :tokens] = output[source, :tokens]
            return changed

        return hook

    def pooled(self, own: Tensor) -> Tensor:
        rows = self.rows_now(None)
        if not rows:
            return own
        return own.index_copy(0, self.places(rows), own[self.places(self._riding(rows))])

    def _riding(self, plan_rows: Sequence[int]) -> list[int]:
        """The rows of the plan that are the targets' own runs."""
        own_runs = {(row.prompt, row.seed): i for i, row in enumerate(self.plan) if row.is_plain}
        return [own_runs[self.plan[i].target, self.plan[i].seed] for i in plan_rows]


def _named(layer: Layer) -> str:
    return f"layer {layer.index} ({layer.name})"


def _exchanged(texts: Any, prompts: Sequence[str], targets: Sequence[str]) -> Any:
    """What another encoder hears in the target's own run: the target if it heard the prompt, else the same."""
    if texts is None:
        return None
    as_list = [texts] if isinstance(texts, str) else list(texts)
    if as_list == list(prompts):
        return list(targets)
    each = len(targets) // len(as_list)
    return [text for text in as_list for _ in range(each)]


def _same_text(one: Tensor, other: Tensor) -> bool:
    """Whether two encodings are of one text, to the rounding of batches of other sizes."""
    if one.shape != other.shape:
        return False
    tolerance = TOLERANCE.get(str(one.dtype).removeprefix("torch."), HALF_TOLERANCE)
    largest = (one - other).abs().max()
    return bool(largest <= tolerance * other.abs().max())


def _stretched(text: Tensor, count: int) -> Tensor:
    """Each row as often as there are pictures of it, `count` in all."""
    return text.repeat_interleave(count // len(text), dim=0)


def _moved(own: Tensor, other: Tensor, places: Tensor) -> Tensor:
    """Some rows of one tensor from another, (rows, ...)."""
    return own.index_copy(0, places, other[places].to(own))


@contextmanager
def record(pipe: Any) -> Iterator[dict[int, list[Tensor]]]:
    """Within the context, collect what each layer hears in calls of the pipeline.

    Opened inside `intervene`, it hears the exchanged text, except where keys and values are patched (SD 3,
    FLUX).

    Args:
        pipe: The pipeline.

    Yields:
        {layer index: [(rows, tokens, width) at each call]}, copies, detached, on their own device.

    Raises:
        LocogenError: A layer was not called.
        UnsupportedModel: The family is unknown.
    """
    layers = find_layers(pipe)
    heard: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}

    def listener(call: Call, layer: Layer) -> Hook:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if layer.joined:
                states = kwargs["hidden_states"][:, : call.states.shape[1]]
            else:
                states = kwargs["encoder_hidden_states"]
            heard[layer.index].append(states.detach().clone())  # (rows, tokens, width)

        return before(layer.module, hook, _named(layer))

    with on_denoiser(pipe, lambda call: [listener(call, layer) for layer in layers]):
        yield heard


def foreign_hooks(pipe: Any) -> tuple[str, ...]:
    """Names of the pipeline's modules that carry somebody else's forward hooks, whose effect nobody can key.

    Those of transformers are the pipeline's own: left behind to collect hidden states (SD-XL, SD 3), changing
    nothing. Hooks of locogen that were copied with their module are somebody else's.
    """
    foreign = []
    for part, component in pipe.components.items():
        for name, module in (
            component.named_modules() if hasattr(component, "named_modules") else ()
        ):
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(_is_foreign(hook, module) for hook in hooks):
                foreign.append(f"{part}.{name}")
    return tuple(foreign)


def _is_foreign(hook: Any, module: Any) -> bool:
    if isinstance(hook, Registered):
        return hook.hook.module is not module
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


def generators(plan: Sequence[Intervention]) -> list[torch.Generator]:
    """One CPU generator a row, seeded with the row's seed: the same noise on every device and in every batch."""
    import torch

    return [torch.Generator("cpu").manual_seed(row.seed) for row in plan]
