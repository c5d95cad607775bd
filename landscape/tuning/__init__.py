"""Search over the numbers of groups, as Optuna trials."""
