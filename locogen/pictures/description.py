"""What moves a picture without being a weight, as lines of text that can be hashed.

Settings lie in attributes: an attention processor's scale, a VAE's tiles, a LoRA's strength,
dropout. Nobody can list them for every library, so all attributes of every object are described,
except those named here that cannot move a picture. A line too many costs a picture that is made
twice; a line too few gives back the wrong one.
"""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import hashlib
import json
import logging
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.models.compilation import is_compiled, uncompiled_module
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

LIBRARIES = {
    *("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "tokenizers"),
    *("huggingface_hub", "safetensors"),  # whose classes and decorators diffusers builds on
}
PLAIN = (bool, int, float, complex, str, bytes, type(None))
SIMPLE = {bool, int, float, str, type(None)}
BUFFER_MARKS = ("_is_buffer", "persistent")  # of torch; lost when a model moves to another device
LONGEST = 256  # characters of a text, or bytes, that stand in a line; longer ones are hashed
TREE_DEPTH = 8  # objects within objects; further down each object is described once, see `add`

# Objects that only wait, count or write messages.
SILENT = (type(threading.Lock()), type(threading.RLock()), logging.Logger, logging.LoggerAdapter)
# What a class statement leaves in a class besides what was written there.
OF_THE_STATEMENT = {
    *("__doc__", "__module__", "__qualname__", "__dict__", "__weakref__", "__slots__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__firstlineno__", "__static_attributes__", "__type_params__", "__parameters__"),
    *("__orig_bases__", "__abstractmethods__", "_abc_impl", "__match_args__", "__slotnames__"),
    *("__dataclass_fields__", "__dataclass_params__", "__conditional_annotations__"),
}
# Parts of a class that only say where an object keeps an attribute.
SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
NAMED_BY_PYTHON = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType),
)

# What modules set in their first call, or in each, from what is described.
SET_BY_MODULES = {
    # VAEs of videos (Wan, Qwen-Image).
    *("_conv_num", "_conv_idx", "_feat_map"),
    *("_enc_conv_num", "_enc_conv_idx", "_enc_feat_map"),
    "freqs_cis",  # Z-Image's table of rotary positions
}
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
    *SET_BY_MODULES,
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
        undescribed: Paths, with their classes, of values that no line can describe.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.undescribed: list[str] = []
        # The objects that are being described: one of their parts may hold its owner.
        self._within: set[int] = set()
        self._classes: set[type] = set()
        # Where each module of a described tree is, each function, and each object far down.
        self._places: dict[int, str] = {}
        # Objects that were made on the way: while they exist, no other gets their id.
        self._alive: list[Any] = []
        # Configs of transformers: all layers of a model hold the same one.
        self._configs: set[int] = set()

    def add(self, path: str, value: Any) -> None:
        """Describe a value of any kind; what cannot be described is named in `undescribed`."""
        if self._add_value(path, value):
            return
        if id(value) in self._within:
            self.lines.append(f"{path} holds its owner")
        elif len(self._within) >= TREE_DEPTH and id(value) in self._places:
            # Objects that share others, at many levels, would otherwise have endless paths.
            self.lines.append(f"{path} is {self._places[id(value)]}")
        else:
            self._places.setdefault(id(value), path)
            self._alive.append(value)
            self._within.add(id(value))
            try:
                self._add_parts(path, value)
            except Exception as error:  # code of the object's own class, such as its `__reduce__`
                self._give_up(path, value, error)
            self._within.discard(id(value))

    def _add_value(self, path: str, value: Any) -> bool:
        """Describe what has no parts: plain values and arrays. Returns whether it is one."""
        import torch

        if isinstance(value, torch.Tensor):
            self._add_tensor(path, value)
        elif type(value) in SIMPLE or isinstance(value, PLAIN):
            self._add_plain(path, value)
        elif isinstance(value, (torch.dtype, torch.device, torch.Size)):
            self.lines.append(f"{path} = {value!r}")
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            self.lines.append(f"{path} = {value.dtype} {value.shape} {digest}")
        elif isinstance(value, torch.Generator):
            self.tensors[path] = value.get_state()
        else:
            return False
        return True

    def _give_up(self, path: str, value: Any, reason: object = "") -> None:
        kind = _full_name(type(value))
        self.lines.append(f"{path} is {kind}, which cannot be described")
        self.undescribed.append(f"{path.strip('.')} ({kind}) {reason or ''}".rstrip())

    def _add_tensor(self, path: str, value: Tensor) -> None:
        # Two classes of one name, as in a notebook, may both have a tensor of the same path.
        while path in self.tensors and self.tensors[path] is not value:
            path += "'"
        self.tensors[path] = value
        if vars(value):
            self.attributes(path, value, BUFFER_MARKS)

    def _add_plain(self, path: str, value: Any) -> None:
        kind: Any = type(value)
        if isinstance(value, enum.Enum):
            self.lines.append(f"{path} = {_full_name(kind)}.{value.name}")
            self.add_class(kind)
            return
        text = _plain_text(value)
        name = "" if kind in PLAIN else f"{_full_name(kind)} "
        self.lines.append(f"{path} = {name}{text}")
        if name and not _of_a_library(kind.__module__):
            self.add_class(kind)
            self.attributes(path, value, ())

    def _add_parts(self, path: str, value: Any) -> None:
        for matches, describe in PARTS:
            if matches(value):
                describe(self, path, value)
                return
        self._add_object(path, value)

    def _add_set(self, path: str, value: Any) -> None:
        # Sets have another order in each process.
        self.lines.append(f"{path} = {sorted(self._text(path, part) for part in value)}")

    def _add_partial(self, path: str, value: Any) -> None:
        self.lines.append(f"{path} is {_full_name(type(value))}")
        self.add(path, (value.func, value.args, value.keywords))

    def _add_bound_method(self, path: str, value: Any) -> None:
        self.add(path, value.__func__)
        self.add(f"{path}.__self__", value.__self__)

    def _add_property(self, path: str, value: Any) -> None:
        self.add(path, (value.fget, value.fset, value.fdel))

    def _add_method_of_a_class(self, path: str, value: Any) -> None:
        self.lines.append(f"{path} is {_full_name(type(value))}")
        self.add(path, value.__func__)

    def _add_named_class(self, path: str, value: Any) -> None:
        self.add_class(value)
        self.lines.append(f"{path} = {_full_name(value)}")

    def _add_whole_python_module(self, path: str, value: Any) -> None:
        self._add_python_module(path, value, names=None)

    def _add_items(self, path: str, value: Any) -> None:
        self.lines.append(f"{path} has {len(value)} in a {type(value).__name__}")
        for place, part in enumerate(value):
            self.add(f"{path}[{place}]", part)

    def _add_mapping(self, path: str, value: Mapping[Any, Any]) -> None:
        names = {self._text(path, key): part for key, part in value.items()}
        # A config's private entries are the versions that wrote it and the folder it came from.
        if type(value).__name__ == "FrozenDict":
            names = {name: part for name, part in names.items() if not name.startswith(" = '_")}
        self.lines.append(f"{path} has {sorted(names)}")
        for name, part in sorted(names.items(), key=lambda item: item[0]):
            self.add(f"{path}[{name}]", part)
        if type(value) is not dict and not _of_a_library(type(value).__module__):
            self.lines.append(f"{path} is {_full_name(type(value))}")
            self.add_class(type(value))
            self.attributes(path, value, ())

    def _text(self, path: str, part: Any) -> str:
        """A key of a mapping, or a part of a set, as one text that says its type and value."""
        if type(part) in SIMPLE:
            return f" = {part!r}"
        # One that stands for itself, whichever part comes first.
        inner = Description()
        inner._within = self._within
        inner.add("", part)
        self.undescribed += [f"{path}{{{name}}}" for name in inner.undescribed]
        if inner.tensors:
            self._give_up(path, part, "within a set, or as a key")
        return "\n".join(inner.lines)

    def _add_object(self, path: str, value: Any) -> None:
        for matches, describe in OBJECTS:
            if matches(value):
                describe(self, path, value)
                return
        self._add_any_object(path, value)

    def _add_kind(self, path: str, value: Any) -> None:
        self.lines.append(f"{path} is {_full_name(type(value))}")

    def _add_path(self, path: str, value: Any) -> None:
        self.lines.append(f"{path} = {_full_name(type(value))} {os.fspath(value)!r}")

    def _add_named_object(self, path: str, value: Any) -> None:
        self.lines.append(f"{path} = {_full_name(type(value))} {value!s}")

    def _add_tokenizer(self, path: str, value: Any) -> None:
        _describe_tokenizer(self, value, ())

    def _add_sentencepiece(self, path: str, value: Any) -> None:
        """The model of a tokenizer that lives in C: as its file would be."""
        self.add(path, value.serialized_model_proto())

    def _add_picture(self, path: str, value: Any) -> None:
        self.add(path, np.asarray(value))

    def _add_any_object(self, path: str, value: Any) -> None:
        """An object's attributes, and what it was made of in C: as `copy.copy` would take it apart.

        It is only taken apart: nothing is pickled.
        """
        kind = type(value)
        self.lines.append(f"{path} is {_full_name(kind)}")
        self.add_class(kind)
        is_scheduler = any(each.__name__ == "SchedulerMixin" for each in kind.__mro__)
        self.attributes(path, value, SET_BY_A_CALL if is_scheduler else ())
        if isinstance(value, functools._lru_cache_wrapper):
            self.add(f"{path}.__wrapped__", value.__wrapped__)
        elif not _is_all_python(kind):
            self._add_c_part(path, value)

    def _add_c_part(self, path: str, value: Any) -> None:
        """What an object keeps outside of its attributes."""
        reduce = copyreg.dispatch_table.get(type(value))
        reduced: Any = value.__reduce_ex__(2) if reduce is None else reduce(value)
        if isinstance(reduced, str):  # the name of a global
            self.add(f"{path} made by", reduced)
            return
        # A function with its arguments; the state; iterators over items and entries, or None.
        function, arguments, state, items, entries = (*reduced, None, None, None)[:5]
        self.add(f"{path} made by", [function, arguments])
        self.add(f"{path} state", state)
        for name, iterator in (("items", items), ("entries", entries)):
            if iterator is not None:
                self.add(f"{path} {name}", list(iterator))

    def _add_config(self, path: str, config: Any) -> None:
        """A config of transformers, and which attention it chose, which it would not save."""
        if id(config) in self._configs:
            return
        self._configs.add(id(config))
        for name, part in sorted(config.to_dict().items()):
            if not name.startswith("_"):
                self.add(f"{path}[{name}]", part)
        self.lines.append(f"{path} attends by {getattr(config, '_attn_implementation', None)}")

    def _add_pipeline(self, path: str, pipe: Pipeline) -> None:
        """A pipeline that an object holds: its own settings, and its parts."""
        self._add_own_settings(path, pipe)
        for name, part in sorted(pipe.components.items()):
            self.add(f"{path}.{name}", part)

    def _add_own_settings(self, path: str, pipe: Pipeline) -> None:
        self.lines.append(f"{path} is {_full_name(type(pipe))}")
        self.add_class(type(pipe))
        self.add(f"{path}.config", pipe.config)
        # Attributes with an underscore are what a call sets.
        private = {name for name in vars(pipe) if name.startswith("_")}
        self.attributes(path, pipe, {*pipe.components, *private})

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

    def module(self, path: str, module: Module) -> None:
        """Describe a module and all modules in it: class, attributes, tensors, training or not."""
        if self._places.get(id(module), path) != path:
            self.lines.append(f"{path} is the module {self._places[id(module)]}")
            return
        skipped = _bookkeeping() | {"forward"}
        layers = dict(module.named_modules())
        # All places first: an attribute of one layer may hold another one.
        for name, layer in layers.items():
            self._places[id(layer)] = path if layer is module else f"{path}.{name}"
        for name, layer in layers.items():
            place = f"{path}.{name}"
            self.lines.append(f"{place} is {_full_name(type(layer))}, training {layer.training}")
            # What `torch.compile` wraps follows as a module of its own.
            if uncompiled_module(layer) is layer:
                self.add_class(type(layer))
                self.attributes(place, layer, skipped)
        # Buffers may be left out of the state dictionary, and still be computed with.
        tensors = module.state_dict()
        for name, tensor in module.named_buffers():
            tensors.setdefault(name, tensor)
        for name, tensor in tensors.items():
            self.add(f"{path}.{name}", tensor)

    def add_class(self, kind: type) -> None:
        """Describe a class that is not a library's: its code, and all its attributes."""
        for each in kind.__mro__:
            if each in self._classes:
                continue
            self._classes.add(each)
            if _of_a_library(each.__module__):
                self._add_changes_of(each)
                continue
            # In a notebook, such a class may change under the same name.
            self.lines.append(f"class {_full_name(each)}")
            for name, value in sorted(_class_attributes(each).items()):
                self.add(f"{_full_name(each)}.{name}", value)

    def _add_changes_of(self, kind: type) -> None:
        """What may have been exchanged in a class of a library, in this process, by another one's.

        Its own code is that of its version. Replaced by code that is no library's, it is not
        described here but named by `replaced_methods`.
        """
        for name, value in vars(kind).items():
            if name in OF_THE_STATEMENT:
                continue
            function = _inner_function(value)
            if type(value) in SIMPLE:
                self.lines.append(f"{_full_name(kind)}.{name} = {value!r}")
            elif hasattr(function, "_torchdynamo_orig_callable"):
                self.lines.append(f"{_full_name(kind)}.{name} is compiled")
            elif isinstance(function, types.FunctionType):
                home = f"{function.__module__}.{function.__qualname__}"
                if home != f"{_full_name(kind)}.{name}":
                    self.lines.append(f"{_full_name(kind)}.{name} = {home}")

    def _add_function(self, path: str, function: Any) -> None:
        self.lines.append(f"{path} = {function.__module__}.{function.__qualname__}")
        original = getattr(function, "_torchdynamo_orig_callable", None)
        if original is not None:
            self.lines.append(f"{path} is compiled")
            self.add(path, original)
            return
        home = _home(function)
        if not _of_a_library(home):
            self.lines.append(f"{path} does {_code(function.__code__)}")
        # Many objects may hold one function: what it names is described at the first of them.
        place = self._places[id(function)]
        if place != path:
            self.lines.append(f"{path} is {place}")
            return
        enclosed = _enclosed(function)
        self.add(f"{path} has", [function.__defaults__, function.__kwdefaults__, enclosed])
        if not _of_a_library(home) and not _is_installed(home):
            attributes = dict(vars(function))
            attributes.pop("__wrapped__", None)
            self.add(f"{path} keeps", attributes)
            self._add_globals(path, function)

    def _add_globals(self, path: str, function: Any) -> None:
        """What a function takes from its module: settings, and other functions."""
        names, attributes = _names(function.__code__)
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            place = f"{path} uses {function.__globals__.get('__name__')}.{name}"
            if isinstance(value, types.ModuleType):
                self._add_python_module(place, value, attributes)
            elif not is_ours(value):
                self.add(place, value)

    def _add_python_module(
        self, path: str, module: types.ModuleType, names: Iterable[str] | None
    ) -> None:
        """A library by its name; another module by those of its variables that are named."""
        name = module.__name__
        self.lines.append(f"{path} = module {name} {_version(name)}".rstrip())
        if _of_a_library(name) or _is_installed(name):
            return
        variables = {part for part in vars(module) if not part.startswith("__")}
        if names is not None:
            variables &= set(names)
        for part in sorted(variables):
            value = vars(module)[part]
            place = f"module {name}.{part}"
            if isinstance(value, types.ModuleType) and id(value) not in self._places:
                self._places[id(value)] = place
                self._add_python_module(place, value, names)
            elif not isinstance(value, types.ModuleType):
                self.add(place, value)

    def _add_builtin(self, path: str, function: Any) -> None:
        """A function written in C, by its name; a method of an object with the object."""
        name = getattr(function, "__qualname__", function.__name__)
        owner = getattr(function, "__self__", None)
        home = getattr(function, "__module__", None) or getattr(function, "__objclass__", None)
        self.lines.append(f"{path} = {home} {name}")
        if owner is not None and not isinstance(owner, (type, types.ModuleType)):
            self.add(f"{path}.__self__", owner)


def _is_a(*kinds: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _is_exactly(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


def _is_items(value: Any) -> bool:
    return type(value) in (list, tuple) or _is_list_of_a_library(value)


def _is_torch_module(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _is_named_by_its_text(value: Any) -> bool:
    """A type hint, or an operator of torch."""
    kind = type(value)
    return kind.__module__ in ("typing", "torch._ops") or kind is types.GenericAlias


def _is_a_picture(value: Any) -> bool:
    """A picture of Pillow, or another object that says how to read it as an array."""
    return hasattr(type(value), "__array_interface__")


# How values with parts are described: the first rule that fits holds.
PARTS: tuple[tuple[Callable[[Any], bool], Callable[[Description, str, Any], None]], ...] = (
    (_is_a(Mapping), Description._add_mapping),
    (_is_items, Description._add_items),
    (_is_exactly(set, frozenset), Description._add_set),
    (_is_a(enum.Enum), Description._add_plain),
    (_is_a(functools.partial), Description._add_partial),
    (_is_a(types.MethodType), Description._add_bound_method),
    (_is_a(types.FunctionType), Description._add_function),
    (_is_a(property), Description._add_property),
    (_is_a(staticmethod, classmethod), Description._add_method_of_a_class),
    (_is_a(*NAMED_BY_PYTHON), Description._add_builtin),
    (_is_a(type), Description._add_named_class),
    (_is_a(types.ModuleType), Description._add_whole_python_module),
)
# Of all other objects, those that say in a way of their own what they are.
OBJECTS: tuple[tuple[Callable[[Any], bool], Callable[[Description, str, Any], None]], ...] = (
    (_is_a(weakref.ref, *SILENT), Description._add_kind),
    (_is_torch_module, Description.module),
    (_is_a(os.PathLike), Description._add_path),
    (_is_named_by_its_text, Description._add_named_object),
    (_has("components", "register_modules"), Description._add_pipeline),
    (_has("get_vocab", "all_special_tokens"), Description._add_tokenizer),
    (_has("serialized_model_proto"), Description._add_sentencepiece),
    (_has("to_dict", "to_json_string"), Description._add_config),
    (_is_a_picture, Description._add_picture),
)


def _plain_text(value: Any) -> str:
    """A plain value as a text that is not too long for a line."""
    if isinstance(value, str) and len(value) > LONGEST:
        return hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()
    if isinstance(value, bytes) and len(value) > LONGEST:
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, int) and value.bit_length() > LONGEST:
        return hex(value)  # Python writes no decimal number of many thousand digits
    base: Any = next(each for each in PLAIN if isinstance(value, each))
    return base.__repr__(value)


def _attributes(owner: Any) -> dict[str, Any]:
    """An object's own attributes, those in slots included."""
    values = {name: getattr(owner, name) for name in _slots(type(owner)) if hasattr(owner, name)}
    return {**values, **getattr(owner, "__dict__", {})}


def _class_attributes(kind: type) -> dict[str, Any]:
    """What was written in a class that may have another content under the same name."""
    # The rest of an installed class does not change but with its version.
    only_simple = _is_installed(kind.__module__) or issubclass(kind, enum.Enum)
    attributes = {}
    for name, value in vars(kind).items():
        if name in OF_THE_STATEMENT or isinstance(value, SLOTS):
            continue
        part = value.value if isinstance(value, enum.Enum) else value
        if not only_simple or isinstance(part, (*PLAIN, types.FunctionType)):
            attributes[name] = part
    return attributes


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


@functools.lru_cache(maxsize=4096)
def _of_a_library(module: str | None) -> bool:
    """Whether code comes from a library, whose version is in the key, or is Python's own."""
    root = str(module).partition(".")[0]
    if root == "__main__":  # a notebook or a script
        return False
    # Named tuples are made by code that is evaluated under a name of its own.
    if root.startswith("namedtuple_"):
        return True
    return root in LIBRARIES or root == "locogen" or root in sys.stdlib_module_names


@functools.lru_cache(maxsize=4096)
def _is_installed(module: str | None) -> bool:
    """Whether code comes from an installed package, and does not change but with its version."""
    root = sys.modules.get(str(module).partition(".")[0])
    places = [getattr(root, "__file__", None) or "", *getattr(root, "__path__", ())]
    return any("site-packages" in place or "dist-packages" in place for place in places)


def _version(module: str) -> str:
    root = sys.modules.get(module.partition(".")[0])
    return str(getattr(root, "__version__", ""))


def _is_list_of_a_library(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and _of_a_library(type(value).__module__)


@functools.lru_cache(maxsize=1024)
def _is_all_python(kind: type) -> bool:
    """Whether all that an object of this class is lies in its attributes: none of it in C."""
    for each in kind.__mro__:
        if each is object:
            return True
        if not each.__flags__ & (1 << 9):  # a class of C that is not on the heap
            return False
        # Only a class statement adds these; to a class whose base has them it need not.
        is_statement = not {"__dict__", "__weakref__", "__slots__"}.isdisjoint(vars(each))
        if not is_statement and each.__base__ is object:
            return False
    return True


@functools.lru_cache(maxsize=4096)
def _code(code: types.CodeType) -> str:
    """A hash of what a function does, without the place where it stands."""
    constants = [_constant(part) for part in code.co_consts]
    text = repr((code.co_code, constants, code.co_names, code.co_varnames))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _constant(part: Any) -> str:
    if isinstance(part, types.CodeType):
        return _code(part)
    # Sets of texts have another order in each process.
    return str(sorted(map(repr, part))) if isinstance(part, frozenset) else repr(part)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a function reads, functions within it included; and all its names."""
    names: set[str] = set()
    attributes = set(code.co_names)
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            names.add(step.argval)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            inner, inner_attributes = _names(part)
            names |= inner
            attributes |= inner_attributes
    return frozenset(names), frozenset(attributes)


def _enclosed(function: Any) -> dict[str, Any]:
    """The variables of an outer function that a function reads."""
    enclosed = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            enclosed[name] = cell.cell_contents
        except ValueError:  # not set yet
            enclosed[name] = None
    return enclosed


def _home(function: Any) -> str:
    """The module in which a function was written: a decorator may claim another in `__module__`."""
    return str(getattr(function, "__globals__", {}).get("__name__", "torch"))


def _inner_function(value: Any) -> Any:
    """The function of a method of any kind, as it stands in its class."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return value.__func__
    if isinstance(value, (functools.partialmethod, functools.partial, functools.cached_property)):
        return value.func
    return value


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


def describe_pipeline(pipe: Pipeline) -> Description:
    """A pipeline's own config and attributes, and its parts' compilation and memory layout."""
    description = Description()
    description._add_own_settings("", pipe)
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


def replaced_methods(pipe: Pipeline) -> tuple[str, ...]:
    """Names of methods that somebody has replaced in a pipeline, and of global hooks.

    What such code does cannot be known from the model: it may read anything. Those of locogen, of
    accelerate's offload and of diffusers' storage hooks are not counted, nor is `torch.compile`.
    """
    names = [f"pipe.{name}" for name in _shadowed_methods(pipe)]
    for part, component in pipe.components.items():
        if component is not None and not hasattr(component, "named_modules"):
            names += [f"{part}.{method}" for method in _shadowed_methods(component)]
    for name, module in _modules(pipe):
        names += [f"{name}.{method}" for method in _shadowed_methods(module)]
        names += [f"{name} ({hook})" for hook in _other_hooks(module)]
    names += _replaced_in_classes(pipe)
    names += _replaced_in_torch()
    return tuple(names)


def _replaced_in_classes(pipe: Pipeline) -> Iterator[str]:
    """Methods that somebody has replaced in a class of a library, for all objects of it."""
    for each in _classes_of(pipe):
        # The code of users' classes is described; locogen's contexts announce themselves.
        is_of_locogen = each.__module__.startswith("locogen.")
        if is_of_locogen or not _of_a_library(each.__module__):
            continue
        for name, value in vars(each).items():
            if _is_foreign(value):
                yield f"{each.__qualname__}.{name}"


def _classes_of(pipe: Pipeline) -> list[type]:
    """The classes of a pipeline, its components, their modules, and what these hold; with bases."""
    modules = [module for _, module in _modules(pipe)]
    owners = [pipe, *pipe.components.values(), *modules]
    kinds = dict.fromkeys(type(owner) for owner in owners)
    # Attention processors, image processors and their like.
    for owner in (pipe, *modules):
        kinds |= dict.fromkeys(type(part) for part in vars(owner).values())
    return list(dict.fromkeys(each for kind in kinds for each in kind.__mro__))


def _is_foreign(value: Any) -> bool:
    """Whether a method, as it stands in a class, is code that is not a library's."""
    if isinstance(value, property):
        return any(map(_is_foreign, (value.fget, value.fset)))
    function = _inner_function(value)
    # Decorators of a library stand around functions of anybody.
    for _ in range(TREE_DEPTH):
        is_function = isinstance(function, types.FunctionType)
        is_callable = callable(function) and not isinstance(function, type)
        home = _home(function) if is_function else type(function).__module__
        if is_callable and not _of_a_library(home):
            return True
        around = getattr(function, "__wrapped__", None)
        inner = getattr(function, "_torchdynamo_orig_callable", around)
        if inner is None:
            return False
        function = _inner_function(inner)
    return False


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


def _modules(pipe: Pipeline) -> Iterator[tuple[str, Any]]:
    """All modules of all components, by their paths."""
    for part, component in sorted(pipe.components.items()):
        if hasattr(component, "named_modules"):
            for name, module in component.named_modules():
                yield f"{part}.{name}".rstrip("."), module


def _shadowed_methods(owner: Any) -> Iterator[str]:
    """Methods of a class in whose place one object has a function of somebody else's."""
    is_offloaded = hasattr(owner, "_hf_hook") or hasattr(owner, "_diffusers_hook")
    for name, value in getattr(owner, "__dict__", {}).items():
        if not callable(value) or not callable(getattr(type(owner), name, None)):
            continue
        # Offload wraps `forward`, to bring the weights.
        is_offloads = is_offloaded and name == "forward"
        if not is_ours(value) and not is_offloads and not _is_compiled_method(owner, name, value):
            yield name


def _is_compiled_method(owner: Any, name: str, value: Any) -> bool:
    """Whether `torch.compile` put this function in the place of the very same method."""
    original = getattr(value, "_torchdynamo_orig_callable", value)
    model = uncompiled_module(owner)
    if model is not owner:  # the wrapper that `torch.compile` makes of a module
        return name == "forward" and getattr(original, "__self__", original) is model
    is_method = getattr(original, "__self__", None) is owner and original is not value
    return is_method and original.__name__ == name and not _is_foreign(original)


def _other_hooks(module: Module) -> list[str]:
    """Hooks of diffusers that do more than move weights: feature caches, skipped layers."""
    registry = getattr(module, "_diffusers_hook", None)
    return [name for name in getattr(registry, "hooks", {}) if name not in STORAGE_HOOKS]
