"""Tests of what runs inside a TorchServe worker."""
