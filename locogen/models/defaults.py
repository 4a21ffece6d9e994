"""Which model a pipeline holds, and the settings that it is usually run with."""

from __future__ import annotations

from locogen.catalog import usual_settings
from locogen.plan import Settings
from locogen.types import Pipeline


def source_of(pipe: Pipeline) -> str:
    """The folder or hub id that the model was loaded from; empty if it was built in place."""
    return str(getattr(pipe.config, "_name_or_path", "") or "")


def name_of(pipe: Pipeline) -> str:
    """What to call the model: the folder or hub id that it was loaded from, or else its class."""
    return source_of(pipe) or type(pipe).__name__


def settings_for(
    pipe: Pipeline,
    *,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    batch_size: int,
) -> Settings:
    """The settings of a run; None: the catalog's value for this model."""
    usual = usual_settings(source_of(pipe))
    steps = usual["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    guidance = usual["guidance_scale"] if guidance_scale is None else guidance_scale
    return Settings(steps, float(guidance), batch_size)


def window_for(pipe: Pipeline, window: int | None) -> int:
    """The number of layers in a window; None: the catalog's number for this model."""
    return usual_settings(source_of(pipe))["window"] if window is None else window
