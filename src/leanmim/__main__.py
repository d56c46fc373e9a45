"""python -m leanmim, as torchrun starts it."""

from leanmim.cli import main

main()
