"""PaDiM and SPADE as their papers describe them, on this package's encoders: what CFLOW-AD is compared with."""

from cflow_fast.bench.baselines.padim import PaDiM
from cflow_fast.bench.baselines.spade import SPADE

__all__ = ["SPADE", "PaDiM"]
