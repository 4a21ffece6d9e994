"""Which layers carry a concept: LocoGen's sweep and race, causal tracing, attention contribution."""
