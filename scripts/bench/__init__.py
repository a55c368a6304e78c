"""Measure the service: load, peers, scaling, settings, a GPU. Nothing that serves imports these."""
