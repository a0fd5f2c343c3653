"""Reports on runs, made from their files: an HTML page, a table for the terminal, a figure."""

from fedgradnorm.report.comparison import ComparisonRow, comparison_rows, comparison_table
from fedgradnorm.report.page import write_report

__all__ = ["ComparisonRow", "comparison_rows", "comparison_table", "write_report"]
