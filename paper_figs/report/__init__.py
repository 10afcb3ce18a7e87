"""Pages and tables of a run: the HTML report, the main table, what the shipped results say."""
