"""Coverage of intervals and level of tests, by simulation from populations whose true values are known."""
