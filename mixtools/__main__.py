"""python -m mixtools: the command without the installed script."""

from .cli.main import main

main()
