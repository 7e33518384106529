"""Fast, exact CFLOW-AD: conditional normalizing flows that find defects in images after seeing good ones only.

The flow of one pooling scale: `FlowDecoder` (trainable), `FoldedDecoder` (fast), `accelerate` (for FrEIA's modules).
The whole model: `CFlowAD`, fitted by `Fit` with a recipe of `PRESETS`; `anomaly_map` is its last step on its own.
"""

# Before anything that takes long:
from cflow_fast import interruption as interruption  # isort: split

from cflow_fast.accelerate import accelerate
from cflow_fast.anomaly import anomaly_map
from cflow_fast.decoder import FlowDecoder
from cflow_fast.errors import CFlowFastError
from cflow_fast.fitting import Fit
from cflow_fast.folded import FoldedDecoder
from cflow_fast.model import CFlowAD
from cflow_fast.positional import positional_encoding
from cflow_fast.prediction import Defect, Prediction
from cflow_fast.recipes import PRESETS, Recipe

__all__ = [
    "PRESETS",
    "CFlowAD",
    "CFlowFastError",
    "Defect",
    "Fit",
    "FlowDecoder",
    "FoldedDecoder",
    "Prediction",
    "Recipe",
    "accelerate",
    "anomaly_map",
    "positional_encoding",
]
