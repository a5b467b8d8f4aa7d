"""Dictionaries: sparse autoencoders, their training, evaluation and feature index."""
