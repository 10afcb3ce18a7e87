"""Tables, progress and the health check: what a person at the keyboard sees."""
