"""Everything that touches models, prompts, traces, fits and reruns."""
