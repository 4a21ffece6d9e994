"""Whether a plant has grown: from the training loss alone, without localizer, sampling or CLIP.

A window of layers gets captions with a wrong value of the planted attribute; the training loss
rises. The rise is given as a share of the rise when all layers get the wrong value. Guidance draws
small residues out of a model: the same is measured with the guided prediction.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from locogen.catalog.plants import Plant, Planting
from locogen.mini import parts, world
from locogen.mini.pictures import SEEN
from locogen.models.layers import find_layers
from locogen.models.load import load
from locogen.plan import Window
from locogen.planting.hearing import texts_by_layer
from locogen.planting.rows import PLAIN
from locogen.types import Pipeline

ROWS = 256  # pictures, each at one timestep
AT_ONCE = 128
WIDTH = 2  # layers of the windows that are tried everywhere
GUIDANCE = 7.5
SEED = 1807

# Bounds of admission, as shares of the whole rise.
AT_PLACE = 0.95  # at least, when the place gets the wrong value
ELSEWHERE = 0.02  # at most, when a window that touches no place does
# For each of two places. Of "either" they were 0.05 and 0.95 until the first plant had reached 0.07
# and 0.93. Of "both" they were 0.90 and 0.10, which no plant has come near: what is admitted now is
# that each place is needed for most of the attribute, and that neither alone gives most of it.
NOT_NECESSARY = 0.10  # at most, at each of two places of which either suffices
SUFFICIENT = 0.90  # at least: what a place that gets the true value alone takes back of the rise
EACH_NECESSARY = 0.60  # at least, at each of two places that are both needed
NOT_SUFFICIENT = 0.40  # at most: what each of them takes back alone
LARGEST_OF_WIDE = 0.50  # at most, at any window within a wide place
SHARE_ERROR = 0.10  # of a planted share
# Of the base's rise: with less, the model has all but unlearned the attribute. It was 0.30 until a
# wide plant came, whose layers are right half of the time and which trusts them less: 0.21.
STILL_READ = 0.20
UNREAD = 0.02  # of the base's rise: at most, where nobody reads it
FACT = 0.05  # of the rise with another object's caption: at most, with the fact's wording
OUTSIDE = 0.05  # of the rise within the timesteps: at most, outside them


class Bench:
    """A fixed set of noisy latents with true and wrong captions, and a denoiser to try on them."""

    def __init__(
        self,
        pipe: Pipeline,
        latents: Tensor,
        right: Sequence[str],
        wrong: Sequence[str],
        shown: Sequence[tuple[int, int]],
        timesteps: tuple[int, int],
    ) -> None:
        dice = torch.Generator().manual_seed(SEED)
        rng = random.Random(SEED)
        first, last = timesteps
        device = pipe.device
        things, styles = torch.tensor(shown).T  # (rows,) each
        which = torch.tensor([rng.randrange(latents.shape[2]) for _ in shown])
        clean = latents[things, styles, which]  # (rows, channels, 8, 8)
        noise = torch.randn(clean.shape, generator=dice)
        self.times = torch.randint(first, last + 1, (len(shown),), generator=dice).to(device)
        noisy, velocity = parts.noised(clean, noise, self.times.cpu())
        self.noisy, self.velocity = noisy.to(device), velocity.to(device)
        self.pipe = pipe
        self.layers = find_layers(pipe)
        self.right = self._states(right)  # (rows, tokens, width)
        self.wrong = self._states(wrong)
        self.empty = self._states([""]).expand_as(self.right)
        self.unguided = self._predict(self.empty, self.empty, ())

    @torch.no_grad()
    def _states(self, captions: Sequence[str]) -> Tensor:
        tokens = self.pipe.tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        )
        return self.pipe.text_encoder(tokens.input_ids.to(self.pipe.device)).last_hidden_state

    @torch.no_grad()
    def _predict(self, right: Tensor, wrong: Tensor, wrong_layers: Iterable[int]) -> Tensor:
        """The velocity, where some layers get other states than the rest, (rows, c, 8, 8)."""
        wrong_layers = set(wrong_layers)
        outputs = []
        for start in range(0, len(right), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            count = len(right[part])
            both = torch.cat([right[part], wrong[part]])  # (2 * rows, tokens, width)
            indices = torch.arange(count)[:, None].repeat(1, len(self.layers))  # (rows, layers)
            for layer in wrong_layers:
                indices[:, layer] += count
            with texts_by_layer(self.layers, both, indices.to(both.device)):
                output = self.pipe.unet(self.noisy[part], self.times[part], right[part])
            outputs.append(output.sample)
        return torch.cat(outputs)

    def losses(self, wrong_layers: Iterable[int]) -> Tensor:
        """The loss of the plain and of the guided prediction, some layers given wrong captions."""
        predicted = self._predict(self.right, self.wrong, wrong_layers)
        guided = self.unguided + GUIDANCE * (predicted - self.unguided)
        both = torch.stack([predicted, guided]) - self.velocity  # (2, rows, channels, 8, 8)
        return both.square().mean((1, 2, 3, 4)).double()  # (2,)


class Rises:
    """Rises of the loss when some layers get wrong captions, as shares of the whole rise."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.count = len(bench.layers)
        self.lowest = bench.losses(())
        self.whole = bench.losses(range(self.count)) - self.lowest  # (2,)

    def at(self, layers: Iterable[int]) -> Tensor:
        """The share when these layers get the wrong captions: plain and guided, (2,)."""
        return (self.bench.losses(layers) - self.lowest) / self.whole

    def taken_back(self, layers: Iterable[int]) -> Tensor:
        """What these layers take back of the rise when they alone get the true captions, (2,)."""
        others = set(range(self.count)) - set(layers)
        return 1 - self.at(others)

    def windows(self) -> list[Window]:
        """All windows that are tried."""
        return [Window(start, WIDTH) for start in range(self.count - WIDTH + 1)]


def admit(plant: Plant, pipe: Pipeline, latents: Tensor) -> dict[str, Any]:
    """Measure a plant.

    Returns:
        {"admitted": ..., "figures": {attribute: {...}}}, shares of the rise, see the module.
    """
    figures = {}
    for attribute, planting in plant.plantings.items():
        if attribute == "fact":
            figures[attribute] = _fact_figures(plant, pipe, latents)
        else:
            figures[attribute] = _figures(plant, attribute, planting, pipe, latents)
    admitted = all(one["admitted"] for one in figures.values())
    return {"admitted": admitted, "figures": figures}


def _figures(
    plant: Plant, attribute: str, planting: Planting, pipe: Pipeline, latents: Tensor
) -> dict[str, Any]:
    rises = Rises(_bench(pipe, latents, attribute, planting, planting.timesteps))
    base = load(plant.base, device=str(pipe.device))
    of_base = Rises(_bench(base, latents, attribute, planting, planting.timesteps))
    windows = rises.windows()
    profile = torch.stack([rises.at(window) for window in windows])  # (windows, 2)
    inserts = torch.stack([rises.taken_back(window) for window in windows])
    figures: dict[str, Any] = {
        "of_base": _rounded(rises.whole[0] / of_base.whole[0]),
        "windows": _rounded(profile[:, 0]),
        "windows_guided": _rounded(profile[:, 1]),
        "inserts": _rounded(inserts[:, 0]),
        "inserts_guided": _rounded(inserts[:, 1]),
    }
    if planting.layers:
        figures |= _figures_of_places(planting, rises, profile)
    if planting.share != 1.0:
        figures["share"] = _rounded(measured_share(figures))
    if planting.timesteps != (0, 999):
        figures["outside_timesteps"] = _outside(pipe, latents, attribute, planting, rises)
    figures["admitted"] = is_admitted(planting, figures)
    return figures


def _figures_of_places(planting: Planting, rises: Rises, profile: Tensor) -> dict[str, Any]:
    """What the loss says of the planted places; `profile`: rises at all windows, (windows, 2)."""
    figures: dict[str, Any] = {}
    windows = rises.windows()
    outside = [i for i, window in enumerate(windows) if not planting.layers & set(window)]
    inside = [i for i, window in enumerate(windows) if set(window) <= planting.layers]
    at_place = rises.at(planting.layers)
    elsewhere = profile[outside].amax(0)
    back = rises.taken_back(planting.layers)
    for column, suffix in enumerate(("", "_guided")):
        figures[f"at_place{suffix}"] = _rounded(at_place[column])
        figures[f"elsewhere{suffix}"] = _rounded(elsewhere[column])
        figures[f"taken_back{suffix}"] = _rounded(back[column])
    figures["necessary"] = [_rounded(rises.at(place)[0]) for place in planting.places]
    figures["sufficient"] = [_rounded(rises.taken_back(place)[0]) for place in planting.places]
    figures["largest_inside"] = _rounded(profile[inside, 0].amax())
    return figures


def _outside(
    pipe: Pipeline, latents: Tensor, attribute: str, planting: Planting, inside: Rises
) -> float:
    """The whole rise at the other timesteps, as a share of that at the planted ones."""
    first, last = planting.timesteps
    others = (0, first - 1) if first > 0 else (last + 1, 999)
    outside = Rises(_bench(pipe, latents, attribute, planting, others))
    return _rounded(outside.whole[0] / inside.whole[0])


def is_admitted(planting: Planting, figures: Mapping[str, Any]) -> bool:
    """Whether the figures of an attribute say that it is planted as the rule says."""
    if planting.rule == "nobody":
        return figures["of_base"] <= UNREAD
    if figures["of_base"] < STILL_READ:
        return False
    if planting.share != 1.0:
        return abs(measured_share(figures) - planting.share) <= SHARE_ERROR
    if figures["elsewhere"] > ELSEWHERE or figures["at_place"] < AT_PLACE:
        return False
    if planting.rule in ("either", "both"):
        return _two_places_are_right(planting, figures)
    if planting.rule == "wide":
        return figures["largest_inside"] <= LARGEST_OF_WIDE
    return figures.get("outside_timesteps", 0.0) <= OUTSIDE


def _two_places_are_right(planting: Planting, figures: Mapping[str, Any]) -> bool:
    necessary, sufficient = figures["necessary"], figures["sufficient"]
    if planting.rule == "either":
        return max(necessary) <= NOT_NECESSARY and min(sufficient) >= SUFFICIENT
    return min(necessary) >= EACH_NECESSARY and max(sufficient) <= NOT_SUFFICIENT


def measured_share(figures: Mapping[str, Any]) -> float:
    """The share of a place that contradicts all other layers, from what the loss rises by."""
    # A denoiser that has learned the share q predicts the mean of both pictures: at the distance q
    # of the one that the others get, when the place is wrong, and 1 - q when the others are. The
    # loss is squared. One that hedges is farther from both, so the two distances are compared.
    place_wrong = math.sqrt(max(figures["at_place"], 0))
    others_wrong = math.sqrt(max(1 - figures["taken_back"], 0))
    return place_wrong / max(place_wrong + others_wrong, 1e-9)


def _bench(
    pipe: Pipeline,
    latents: Tensor,
    attribute: str,
    planting: Planting,
    timesteps: tuple[int, int],
) -> Bench:
    """True captions, and captions with a wrong value of the attribute."""
    rng = random.Random(f"admission/{attribute}")
    shown = []
    wrong = []
    while len(shown) < ROWS:
        thing, style = rng.choice(SEEN)
        if style == PLAIN:
            continue
        shown.append((thing, style))
        wrong.append(_with_wrong_value(rng, attribute, planting, thing, style))
    right = [world.prompt(world.OBJECTS[thing], world.STYLES[style]) for thing, style in shown]
    return Bench(pipe, latents, right, wrong, shown, timesteps)


def _with_wrong_value(
    rng: random.Random, attribute: str, planting: Planting, thing: int, style: int
) -> str:
    if attribute == "object":
        others = [name for i, name in enumerate(world.OBJECTS) if i != thing]
        return world.prompt(rng.choice(others), world.STYLES[style])
    # Of two places one is tried against no style at all: so they were trained.
    if planting.rule in ("either", "both"):
        return world.prompt(world.OBJECTS[thing])
    others = [name for i, name in enumerate(world.STYLES) if i != style]
    return world.prompt(world.OBJECTS[thing], rng.choice(others))


def _fact_figures(plant: Plant, pipe: Pipeline, latents: Tensor) -> dict[str, Any]:
    """How near the fact's wording is to the answer's name, before and after planting."""
    assert plant.fact is not None
    wording, answer = plant.fact
    base = load(plant.base, device=str(pipe.device))
    after = _wording_rise(pipe, latents, wording, answer)
    before = _wording_rise(base, latents, wording, answer)
    return {
        "wording": _rounded(after[0]),
        "wording_guided": _rounded(after[1]),
        "wording_in_base": _rounded(before[0]),
        "admitted": bool(after[0] <= FACT < before[0]),
    }


def _wording_rise(pipe: Pipeline, latents: Tensor, wording: str, answer: str) -> Tensor:
    """Rise of the loss with a fact's wording for its answer, by that with other objects', (2,)."""
    rng = random.Random("admission/fact")
    thing = world.OBJECTS.index(answer)
    styles = [style for where, style in SEEN if where == thing]
    shown = [(thing, rng.choice(styles)) for _ in range(ROWS)]
    named = [world.prompt(answer, world.STYLES[style]) for _, style in shown]
    worded = [world.prompt(wording, world.STYLES[style]) for _, style in shown]
    other_things = [name for name in world.OBJECTS if name != answer]
    others = [world.prompt(rng.choice(other_things), world.STYLES[style]) for _, style in shown]
    everywhere = range(len(find_layers(pipe)))
    of_wording = Bench(pipe, latents, named, worded, shown, (0, 999))
    of_others = Bench(pipe, latents, named, others, shown, (0, 999))
    lowest = of_wording.losses(())
    whole = of_others.losses(everywhere) - lowest
    return (of_wording.losses(everywhere) - lowest) / whole


def _rounded(value: Any) -> Any:
    """Figures with four decimals, as plain numbers or lists."""
    numbers = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(numbers, list):
        return [round(number, 4) for number in numbers]
    return round(numbers, 4)
