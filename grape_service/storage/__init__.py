"""Local folders and S3 behind one class with conditional writes."""

from grape_service.storage.storage import Storage

__all__ = ["Storage"]
