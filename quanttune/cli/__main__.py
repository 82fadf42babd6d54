"""`python -m quanttune.cli`."""

from . import main

main()
