"""What a person looks at: tables, pictures and the report page."""

from nat_jax.report.charts import curves
from nat_jax.report.page import write_report
from nat_jax.report.pictures import filters, neighbours
from nat_jax.report.tables import markdown_table, text_table

__all__ = ["curves", "filters", "markdown_table", "neighbours", "text_table", "write_report"]
