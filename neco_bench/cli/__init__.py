"""The command line: one module per noun. The only package that prints."""
