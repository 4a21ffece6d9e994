"""Models whose answer is known: mini and mini-b, trained until known layers read a concept."""
