"""Attacks on edits: whether someone who tries gets a removed concept back."""
