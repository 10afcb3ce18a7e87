"""Batched decoding of both models under a policy, and what is recorded of each step."""
