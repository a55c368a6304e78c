"""Build the archive that TorchServe serves, and check it."""
