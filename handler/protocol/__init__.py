"""Bytes and headers -> frozen requests; results -> replies. Knows nothing of TorchServe or torch."""
