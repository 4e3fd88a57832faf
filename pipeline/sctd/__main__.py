"""`python -m sctd`, the form in which launchers start it."""

from sctd.cli import main

raise SystemExit(main())
