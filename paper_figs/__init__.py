"""Figures, tables and the report: each a function of a run's stored results, none runs a model."""
