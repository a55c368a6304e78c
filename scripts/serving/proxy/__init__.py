"""Envoy in front of one server or several: its configuration, made from an archive and settings, and its process."""
