"""Contexts that change or record what layers get, and leave the model unchanged afterwards."""
