"""From names to stored results: options, jobs, execution, cost estimates, launchers."""
