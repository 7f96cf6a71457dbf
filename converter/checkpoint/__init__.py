"""The formats: stages, plans, what is written beside the weights, the manifest, and the folder of a model."""
