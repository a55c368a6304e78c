"""Serve an archive, wait until it gives the right answers, ask it."""
