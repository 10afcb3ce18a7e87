"""Pairs of models: where they come from, how they are fetched, verified, converted and loaded."""
