"""`python -m cflow_fast` is `cflow-fast`."""

from cflow_fast.cli import main

main(prog_name="cflow-fast")
