"""Fast, exact CFLOW-AD: conditional normalizing flows for defect detection."""

from cflow_fast.decoder import FlowDecoder
from cflow_fast.folded import FoldedDecoder

__all__ = ["FlowDecoder", "FoldedDecoder"]
