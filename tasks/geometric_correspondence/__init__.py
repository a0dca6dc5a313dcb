"""Geometric correspondence between views of an object."""
