"""Change what layers make of a concept: closed-form edits, neurons, and what an edit did."""
