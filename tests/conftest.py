"""Shapes and dtypes in signatures are checked while tests run, and only then."""

from jaxtyping import install_import_hook

install_import_hook(["jaxsloth.kernels"], "beartype.beartype")
