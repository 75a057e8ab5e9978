"""The version of this package, said once: pyproject.toml, manifests and `grape --version` read it here."""

__version__ = "0.1.0"
