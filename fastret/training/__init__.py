"""Quickstart training of a small embedding network on real data."""
