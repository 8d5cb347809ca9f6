"""`python -m experiments …` is `cardiomix …`."""

from experiments.cli.main import main

main()
