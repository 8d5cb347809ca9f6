"""A synthetic multi-vendor short-axis cine data set in the layout of M&Ms. A seed always gives the same bytes."""

from __future__ import annotations

from pipeline.phantom.plan import PhantomConfig
from pipeline.phantom.write import is_written, write_phantom

__all__ = ["PhantomConfig", "is_written", "write_phantom"]
