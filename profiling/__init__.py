"""Measurements: each script prints a table, and what it measured on."""
