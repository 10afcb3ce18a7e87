"""Reruns at derived settings, held against their predictions, and studies of the guarantees."""
