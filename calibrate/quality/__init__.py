"""Scores of the texts that reruns wrote."""
