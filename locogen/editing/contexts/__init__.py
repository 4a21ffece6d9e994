"""Edits that change no weight: contexts in which a model does without a concept."""
