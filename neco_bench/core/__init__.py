"""Basic modules used by all packages: errors, registry, configuration, files, random numbers, protocols."""
