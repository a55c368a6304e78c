"""Saliency maps -> PNG."""
