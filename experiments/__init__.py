"""Runs of many configs, and their tables."""
