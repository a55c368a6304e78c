"""Command-line programs around the service: package it, start it, ask it, measure it."""
