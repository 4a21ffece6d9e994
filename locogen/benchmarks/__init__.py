"""Localizers on models whose answer is known: what each says, scored by what was planted."""
