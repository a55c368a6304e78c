"""Explain many images without a server, with an archive's own handler, into Parquet files."""
