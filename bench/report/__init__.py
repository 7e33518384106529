"""Results as a page and as a figure: `load` files, then `write_report` or `throughput_figure`."""

from cflow_fast.bench.report.data import Source, load
from cflow_fast.bench.report.figure import throughput_figure
from cflow_fast.bench.report.page import report, write_report

__all__ = ["Source", "load", "report", "throughput_figure", "write_report"]
