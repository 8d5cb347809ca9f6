"""`python -m experiments …` is `cardiomix …`."""

from experiments.cli import main

main()
