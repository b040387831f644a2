"""`python -m rayllm`, where the `rayllm` script is not on the path."""

from rayllm.cli.main import main

main()
