"""A synthetic multi-vendor short-axis cine data set, in M&Ms' own layout; deterministic to the byte for a seed."""

from __future__ import annotations

from pipeline.phantom.write import PhantomConfig, write_phantom

__all__ = ["PhantomConfig", "write_phantom"]
