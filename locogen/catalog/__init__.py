"""The models, scorers and concepts that locogen knows by name.

`models.toml` and `concepts.toml` are the data; `models.py` and `concepts.py` read them, and files
of the same form with models and concepts of your own.
"""

from locogen.catalog.concepts import concept, concepts
from locogen.catalog.models import (
    ModelEntry,
    ScorerEntry,
    entry_of,
    mini_folder,
    model_entries,
    model_entry,
    model_table,
    published_start,
    read_toml,
    register,
    scorer_entry,
    usual_settings,
)
from locogen.catalog.plants import Plant, Planting, plant_entries, plant_entry, plants

__all__ = [
    "ModelEntry",
    "Plant",
    "Planting",
    "ScorerEntry",
    "concept",
    "concepts",
    "entry_of",
    "mini_folder",
    "model_entries",
    "model_entry",
    "model_table",
    "plant_entries",
    "plant_entry",
    "plants",
    "published_start",
    "read_toml",
    "register",
    "scorer_entry",
    "usual_settings",
]
