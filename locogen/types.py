"""Names for what the libraries underneath type loosely, or not at all.

Type checkers see `Any`: a pipeline's parts are attributes that its class does not declare, and so
are the matrices of an attention layer. The names say to a reader what is meant.
"""

from typing import Any, TypeAlias

Pipeline: TypeAlias = Any  # a diffusers pipeline of one of the families
Module: TypeAlias = Any  # a `torch.nn.Module`: a denoiser, a text encoder, or a part of one
