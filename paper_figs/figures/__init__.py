"""One figure a module; each draws what stored results say and computes nothing."""
