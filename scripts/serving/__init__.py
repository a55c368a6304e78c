"""Serve an archive, wait until it answers rightly, ask it."""
