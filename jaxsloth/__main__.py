"""`python -m jaxsloth` is `jaxsloth info`; with arguments it is `jaxsloth`."""

import sys

from jaxsloth.cli import main

main(sys.argv[1:] or ["info"])
