"""Tables, charts, pictures and the report page of a run."""

from nat_jax.report.page import write_report
from nat_jax.report.pictures import filters, neighbours, stacked
from nat_jax.report.tables import markdown_table, network_name, probe_name, text_table

__all__ = [
    "filters",
    "markdown_table",
    "neighbours",
    "network_name",
    "probe_name",
    "stacked",
    "text_table",
    "write_report",
]
