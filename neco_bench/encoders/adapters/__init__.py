"""One adapter per source of encoders; each has `build(spec)`."""
