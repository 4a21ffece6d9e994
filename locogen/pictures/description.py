"""What moves a picture without being a weight, as lines of text that can be hashed.

Settings lie in attributes: an attention processor's scale, a VAE's tiles, a LoRA's strength,
dropout. Nobody can list them for every library, so all attributes of every object are described,
except those named here that cannot move a picture. A line too many costs a picture that is made
twice; a line too few gives back the wrong one.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import os
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.models.compilation import is_compiled

if TYPE_CHECKING:
    from torch import Tensor

LIBRARIES = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "tokenizers"}
PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
SIMPLE = {bool, int, float, str, type(None)}
DEEPEST = 8  # objects within objects

# Attributes that cannot move a picture.
WITHOUT_EFFECT = {
    # Where a model came from.
    *("name_or_path", "vocab_file", "init_kwargs", "init_inputs"),
    *("peft_config", "_hf_peft_config_loaded", "_is_hf_initialized"),
    # What training needs, and which warnings were given.
    *("gradient_checkpointing", "_gradient_checkpointing_func"),
    *("warnings_issued", "deprecation_warnings"),
    # What offload keeps of a module.
    *("_hf_hook", "_old_forward", "_diffusers_hook", "hf_device_map"),
    # What is described in another way, or set within a call.
    *("_in_target_context_manager", "_tokenizer", "_output_capturing_hooks_installed"),
}
# What schedulers set anew at the beginning of each call, or count within it.
SET_BY_A_CALL = {
    # The steps.
    *("timesteps", "_timesteps", "custom_timesteps", "num_inference_steps", "timestep_list"),
    *("timesteps_interpol", "prk_timesteps", "plms_timesteps", "order_list"),
    # Noise levels and sizes of steps.
    *("sigmas", "_sigmas_cpu", "sigmas_interpol", "sigmas_up", "sigmas_down", "log_sigmas"),
    *("sigma_data", "dt", "noise_sampler"),
    # Where in the steps a call is.
    *("_step_index", "_begin_index", "_index_counter", "counter", "this_order"),
    *("lower_order_nums", "is_scale_input_called"),
    # What earlier steps put out.
    *("sample", "last_sample", "cur_sample", "model_outputs", "model_output_list"),
    *("cur_model_output", "derivatives", "prev_derivative", "ets"),
}
# Hooks of diffusers that move weights, or change their precision: the weights' lines show that.
STORAGE_HOOKS = (
    "layerwise_casting",
    "peft_autocast_disable",
    "group_offloading",
    "lazy_prefetch_group_offloading",
)
# What attention, convolutions and norms are computed by: some speed-up packages exchange these.
FUNCTIONS = (
    *("scaled_dot_product_attention", "linear", "conv2d", "group_norm", "layer_norm"),
    *("silu", "gelu", "softmax"),
)

# Settings of torch that move numbers, by their path from `torch`.
FLAGS = (
    "backends.cuda.matmul.allow_tf32",
    "backends.cuda.matmul.fp32_precision",
    "backends.cuda.matmul.allow_fp16_accumulation",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.flash_sdp_enabled",
    "backends.cuda.mem_efficient_sdp_enabled",
    "backends.cuda.math_sdp_enabled",
    "backends.cuda.cudnn_sdp_enabled",
    "backends.cudnn.enabled",
    "backends.cudnn.benchmark",
    "backends.cudnn.deterministic",
    "backends.cudnn.allow_tf32",
    "backends.cudnn.conv.fp32_precision",
    "backends.mkldnn.enabled",
    "backends.mkldnn.allow_tf32",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
    "backends.fp32_precision",
    "get_float32_matmul_precision",
    "get_default_dtype",
    "get_default_device",
    "are_deterministic_algorithms_enabled",
)

# Environment variables that move numbers.
VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DIFFUSERS_ATTN_BACKEND",
)


class Description:
    """Lines about objects, and the tensors that they hold.

    Attributes:
        lines: The lines, each with the path of attributes that leads to what it says.
        tensors: Tensors by that path; they are hashed apart.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        # The objects that are being described: one of their parts may hold its owner.
        self._within: list[int] = []
        self._classes: set[type] = set()
        # Configs of transformers: all layers of a model hold the same one.
        self._configs: set[int] = set()

    def add(self, path: str, value: Any) -> None:
        """Describe a value of any kind; what cannot be described is named by its class."""
        import torch

        if isinstance(value, torch.Tensor):
            self.tensors[path] = value
            if vars(value):
                self.attributes(path, value, ())
        elif isinstance(value, (*PLAIN, torch.dtype, torch.device, torch.Size)):
            self.lines.append(f"{path} = {value!r}")
        elif isinstance(value, np.ndarray):
            pixels = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            self.lines.append(f"{path} = {value.dtype} {value.shape} {pixels}")
        elif isinstance(value, torch.Generator):
            self.tensors[path] = value.get_state()
        elif id(value) not in self._within and len(self._within) < DEEPEST:
            self._within.append(id(value))
            self._add_parts(path, value)
            self._within.pop()

    def _add_parts(self, path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            self._add_mapping(path, value)
        elif isinstance(value, (list, tuple)):
            self.lines.append(f"{path} has {len(value)}")
            for place, part in enumerate(value):
                self.add(f"{path}[{place}]", part)
        elif isinstance(value, (set, frozenset)):
            self.lines.append(f"{path} = {sorted(map(str, value))}")
        elif isinstance(value, functools.partial):
            self.add(path, (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._add_function(path, value.__func__)
        elif isinstance(value, types.FunctionType):
            self._add_function(path, value)
        elif isinstance(value, type):
            self.add_class(value)
            self.lines.append(f"{path} = {_full_name(value)}")
        else:
            self._add_object(path, value)

    def _add_mapping(self, path: str, value: Mapping[Any, Any]) -> None:
        # A config's private entries are the versions that wrote it and the folder it came from.
        names = {str(key): part for key, part in value.items() if not str(key).startswith("_")}
        self.lines.append(f"{path} has {sorted(names)}")
        for name, part in sorted(names.items()):
            self.add(f"{path}[{name}]", part)

    def _add_object(self, path: str, value: Any) -> None:
        import torch

        self.lines.append(f"{path} is {_full_name(type(value))}")
        self.add_class(type(value))
        # Python's own objects, such as locks, say nothing that moves a picture.
        is_pythons_own = _root(type(value)) in sys.stdlib_module_names
        if is_pythons_own and not isinstance(value, types.SimpleNamespace):
            return
        if isinstance(value, torch.nn.Module):
            self.module(path, value)
        elif hasattr(value, "to_dict") and hasattr(value, "to_json_string"):
            self._add_config(path, value)
        else:
            self.attributes(path, value, ())

    def _add_config(self, path: str, config: Any) -> None:
        """A config of transformers, and which attention it chose, which it would not save."""
        if id(config) in self._configs:
            return
        self._configs.add(id(config))
        self.add(path, {name: str(part) for name, part in config.to_dict().items()})
        self.lines.append(f"{path} attends by {getattr(config, '_attn_implementation', None)}")

    def attributes(self, path: str, owner: Any, skipped: Iterable[str]) -> None:
        """Describe the attributes that an object has of its own, by name."""
        values = _attributes(owner)
        for name in sorted(values.keys() - WITHOUT_EFFECT - set(skipped)):
            value = values[name]
            # Most are simple, and a large model has many thousands: these go the short way.
            if type(value) in SIMPLE:
                self.lines.append(f"{path}.{name} = {value!r}")
            elif not isinstance(value, weakref.ref) and not is_ours(value):
                self.add(f"{path}.{name}", value)

    def module(self, path: str, module: Any) -> None:
        """Describe a module and all modules in it: class, attributes, tensors, training or not."""
        skipped = _bookkeeping() | {"forward"}
        for name, layer in module.named_modules():
            place = f"{path}.{name}"
            self.lines.append(f"{place} is {_full_name(type(layer))}, training {layer.training}")
            self.add_class(type(layer))
            self.attributes(place, layer, skipped)
        # Buffers may be left out of the state dictionary, and still be computed with.
        tensors = module.state_dict()
        for name, tensor in module.named_buffers():
            tensors.setdefault(name, tensor)
        for name, tensor in tensors.items():
            self.add(f"{path}.{name}", tensor)

    def add_class(self, kind: type) -> None:
        """Describe the code of a class that is not a library's."""
        # In a notebook, such a class may change under the same name.
        for each in kind.__mro__:
            if each in self._classes or _of_a_library(each.__module__):
                continue
            self._classes.add(each)
            self.lines.append(f"class {_full_name(each)}")
            for name, value in sorted(vars(each).items()):
                if name in ("__doc__", "__module__"):
                    continue
                if isinstance(value, (types.FunctionType, *PLAIN)):
                    self.add(f"{_full_name(each)}.{name}", value)

    def _add_function(self, path: str, function: Any) -> None:
        name = f"{function.__module__}.{function.__qualname__}"
        self.lines.append(f"{path} = {name}")
        if not _of_a_library(function.__module__):
            self.lines.append(f"{path} does {_code(function.__code__)}")
        enclosed = inspect.getclosurevars(function).nonlocals
        self.add(f"{path} has", [function.__defaults__, function.__kwdefaults__, enclosed])


def _attributes(owner: Any) -> dict[str, Any]:
    """An object's own attributes, those in slots included."""
    values = {name: getattr(owner, name) for name in _slots(type(owner)) if hasattr(owner, name)}
    return {**values, **getattr(owner, "__dict__", {})}


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(name for each in kind.__mro__ for name in vars(each).get("__slots__", ()))


@functools.cache
def _bookkeeping() -> frozenset[str]:
    """The attributes that torch gives every module: weights, children, hooks."""
    import torch

    return frozenset({*vars(torch.nn.Module()), "_compiled_call_impl", "_forward_module"})


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _of_a_library(module: str | None) -> bool:
    """Whether code comes from a library, whose version is in the key, or is Python's own."""
    root = str(module).partition(".")[0]
    if root == "__main__":  # a notebook or a script
        return False
    return root in LIBRARIES or root == "locogen" or root in sys.stdlib_module_names


def _code(code: types.CodeType) -> str:
    """A hash of what a function does, without the place where it stands."""
    constants = [
        _code(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts
    ]
    text = repr((code.co_code, constants, code.co_names, code.co_varnames))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_ours(function: Any) -> bool:
    """Whether a function is locogen's, put on a model within a context that announces itself."""
    inner = function.func if isinstance(function, functools.partial) else function
    names = getattr(inner, "__globals__", {})
    home = names.get("__name__", type(inner).__module__)
    return str(home).startswith("locogen.")


# --- the parts of a pipeline ---------------------------------------------------------------------


def describe_component(component: Any, skipped: Iterable[str] = ()) -> Description:
    """A component of a pipeline: its config and the attributes of all its modules.

    A tokenizer: its whole vocabulary and its rules. `skipped` names attributes of a tokenizer that
    the pipeline sets in each call.
    """
    description = Description()
    if hasattr(component, "get_vocab"):
        _describe_tokenizer(description, component, skipped)
    else:
        description.add("", component)
    return description


def _describe_tokenizer(description: Description, tokenizer: Any, skipped: Iterable[str]) -> None:
    """A tokenizer's rules as they would be saved."""
    description.attributes("", tokenizer, skipped)
    description.add_class(type(tokenizer))
    description.lines.append(repr(sorted(tokenizer.get_vocab().items())))
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        # Each call sets these two.
        rules.pop("truncation", None)
        rules.pop("padding", None)
        description.lines.append(json.dumps(rules, sort_keys=True))


def describe_pipeline(pipe: Any) -> Description:
    """A pipeline's own config and attributes, and its parts' compilation and memory layout."""
    description = Description()
    description.lines.append(_full_name(type(pipe)))
    description.add_class(type(pipe))
    description.add("config", pipe.config)
    # Attributes with an underscore are what a call sets.
    private = {name for name in vars(pipe) if name.startswith("_")}
    description.attributes("", pipe, {*pipe.components, *private})
    for part, component in pipe.components.items():
        if hasattr(component, "named_modules") and is_compiled(component):
            description.lines.append(f"{part} is compiled")
    for part, module in _modules(pipe):
        for name, tensor in module.named_parameters(recurse=False):
            if not tensor.is_contiguous():
                description.lines.append(f"{part}.{name} has strides {tensor.stride()}")
    return description


def describe_scheduler(scheduler: Any) -> Description:
    """A scheduler's config and attributes, without those that each call sets."""
    description = Description()
    description.lines.append(_full_name(type(scheduler)))
    description.add_class(type(scheduler))
    description.attributes("", scheduler, SET_BY_A_CALL)
    return description


def torch_settings(device: str) -> dict[str, str]:
    """What torch, diffusers and the environment set about how numbers are computed, by name.

    Args:
        device: The kind of device that the pipeline computes on, such as "cuda".

    Returns:
        Those that this version of torch knows. The number of threads is not among them: it moves
        sums in the last bits only, and the same study may run with more or fewer.
    """
    import torch

    settings = {}
    for name in FLAGS:
        value = _flag(torch, name)
        if value is not None:
            settings[name] = value
    if torch.is_autocast_enabled(device):
        settings["autocast"] = str(torch.get_autocast_dtype(device))
    settings |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    settings["attention"] = str(getattr(registry, "_active_backend", None))
    return settings


def _flag(root: Any, path: str) -> str | None:
    value = root
    try:
        for name in path.split("."):
            value = getattr(value, name)
        return str(value() if callable(value) else value)
    except AttributeError:
        return None  # this version of torch does not have it
    except RuntimeError:
        return "set by the older and the newer way at once"


# --- what cannot be described --------------------------------------------------------------------


def replaced_methods(pipe: Any) -> tuple[str, ...]:
    """Names of methods that somebody has replaced in a pipeline, and of global hooks.

    What such code does cannot be known from the model: it may read anything. Those of locogen, of
    accelerate's offload and of diffusers' storage hooks are not counted.
    """
    names = [f"pipe.{name}" for name in _replaced(pipe)]
    for part, component in pipe.components.items():
        if component is not None and not hasattr(component, "named_modules"):
            names += [f"{part}.{method}" for method in _replaced(component)]
    for name, module in _modules(pipe):
        names += [f"{name}.{method}" for method in _replaced(module)]
        names += [f"{name} ({hook})" for hook in _other_hooks(module)]
    names += _replaced_in_torch()
    return tuple(names)


def _replaced_in_torch() -> Iterator[str]:
    """Global hooks, and functions of torch that somebody has exchanged for all models."""
    import torch

    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        yield "every module (a global hook of torch)"
    for name in FUNCTIONS:
        function = getattr(torch.nn.functional, name)
        # Built-in functions have no module: they are torch's.
        home = getattr(function, "__module__", None) or "torch"
        if not str(home).startswith("torch"):
            yield f"torch.nn.functional.{name}"


def _modules(pipe: Any) -> Iterator[tuple[str, Any]]:
    """All modules of all components, by their paths."""
    for part, component in sorted(pipe.components.items()):
        if hasattr(component, "named_modules"):
            for name, module in component.named_modules():
                yield f"{part}.{name}".rstrip("."), module


def _replaced(owner: Any) -> Iterator[str]:
    """The methods for which one object has a function of its own; and `forward`, if its class has.

    The class of a library may have had its `forward` exchanged, for all its objects.
    """
    yield from _shadowed_methods(owner)
    forward = getattr(type(owner), "forward", None)
    if forward is None or not _of_a_library(type(owner).__module__):
        return
    home = getattr(forward, "__globals__", {}).get("__name__", "torch")
    if not _of_a_library(home):
        yield "forward"


def _shadowed_methods(owner: Any) -> Iterator[str]:
    """Methods of a class in whose place one object has a function of somebody else's."""
    is_offloaded = hasattr(owner, "_hf_hook") or hasattr(owner, "_diffusers_hook")
    for name, value in getattr(owner, "__dict__", {}).items():
        if not callable(value) or not callable(getattr(type(owner), name, None)):
            continue
        # Offload wraps `forward`, to bring the weights.
        is_offloads = is_offloaded and name == "forward"
        if not is_ours(value) and not is_offloads:
            yield name


def _other_hooks(module: Any) -> list[str]:
    """Hooks of diffusers that do more than move weights: feature caches, skipped layers."""
    registry = getattr(module, "_diffusers_hook", None)
    return [name for name in getattr(registry, "hooks", {}) if name not in STORAGE_HOOKS]
