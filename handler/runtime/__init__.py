"""What keeps a worker running: the archive's files, metrics, and the allocator."""
