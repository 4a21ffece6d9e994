"""Which layers carry a concept: LocoGen's sweep and race, tracing, attention contribution."""
