"""Metrics over a data set, with their uncertainty."""
