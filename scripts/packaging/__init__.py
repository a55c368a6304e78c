"""Build the archive that TorchServe serves, and smoke-test it."""
