"""The parity ladder: measured numbers that show both backends to reach what third parties reach. `run` is `jaxsloth parity`."""

from jaxsloth.parity.run import run

__all__ = ["run"]
