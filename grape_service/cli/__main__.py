"""`python -m grape_service.cli` is `grape`."""

from grape_service.cli import main

main()
