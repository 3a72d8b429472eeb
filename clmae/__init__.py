"""Curriculum-learned masked autoencoders: MAE, CL-MAE and their relatives."""

__version__ = "0.1.0"


def __getattr__(name):
    """`clmae.load` arrives on first use, so that `import clmae` stays free of torch."""
    if name == "load":
        from clmae.mae import load

        return load
    raise AttributeError(f"module 'clmae' has no attribute {name!r}")
