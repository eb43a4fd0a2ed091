"""`python -m seriatim` is the command line."""

from seriatim.cli.main import main

raise SystemExit(main())
