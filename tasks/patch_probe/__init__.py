"""Patch probe: k nearest neighbours and logistic regression on single patches."""
