"""Results over many runs: comparisons, tables, plots."""
