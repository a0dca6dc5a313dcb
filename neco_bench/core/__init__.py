"""What every other package builds on: errors, registry, configuration, files, random numbers, protocols."""
