"""Data sets: files to arrays, splits and batches."""
