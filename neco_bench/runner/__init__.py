"""Turn names into jobs and stored results: options, jobs, execution, cost estimates, launchers."""
