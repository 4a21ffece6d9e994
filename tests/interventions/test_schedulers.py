"""The theorems of the intervention, with every scheduler that diffusers has for a family."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import following, steps_of_calls
from locogen.interventions.prompts import generators, intervene, with_own_runs
from locogen.models.families import denoiser_of, family_of
from locogen.models.layers import find_layers
from locogen.pictures.batches import Texts, called
from locogen.plan import Intervention, Settings, with_riders
