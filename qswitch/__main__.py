"""`python -m qswitch` is the command `qswitch`."""

from qswitch.cli import main

main()
