"""Tests of the network, its data and its training."""
