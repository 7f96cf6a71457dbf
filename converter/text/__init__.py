"""Token windows: of a text, of a mixture, sampled from a model."""
