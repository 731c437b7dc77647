"""Distances between sets of pictures, one file a metric."""
