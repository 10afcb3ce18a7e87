"""The run folder, its files and its prompts; knows nothing of models."""
