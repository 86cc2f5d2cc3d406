"""One recipe with several values of some keys: a run for each combination, side by side. No torch."""
