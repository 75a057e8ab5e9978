"""Releases: immutable, named, verifiable dataset versions in a folder or a bucket."""
