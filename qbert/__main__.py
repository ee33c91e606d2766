"""`python -m qbert`."""

from qbert.cli import main

main()
