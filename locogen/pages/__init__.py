"""A results folder as HTML pages."""
