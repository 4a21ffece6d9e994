"""Contexts that change or record what layers get while a pipeline runs, and leave the model as found."""
