"""A synthetic multi-vendor short-axis cine data set, in M&Ms' own layout; deterministic to the byte for a seed."""

from __future__ import annotations

from pipeline.phantom.plan import PhantomConfig
from pipeline.phantom.write import is_written, write_phantom

__all__ = ["PhantomConfig", "is_written", "write_phantom"]
