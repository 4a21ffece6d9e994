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

__all__ = [
    "ModelEntry",
    "ScorerEntry",
    "concept",
    "concepts",
    "entry_of",
    "mini_folder",
    "model_entries",
    "model_entry",
    "model_table",
    "published_start",
    "read_toml",
    "register",
    "scorer_entry",
    "usual_settings",
]
