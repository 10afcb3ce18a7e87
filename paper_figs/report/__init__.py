"""Pages and tables of a run: the HTML report, the main table, the README's findings."""
