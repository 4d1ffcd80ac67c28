"""``python -m teefusion.cli``."""

from teefusion.cli import main

main()
