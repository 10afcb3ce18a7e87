"""What a trace says: the line, the scores side by side, calibration.json."""
