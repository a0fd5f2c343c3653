"""Runs as one self-contained HTML page, and as a table for the terminal: from the runs' files alone."""

from fedgradnorm.report.comparison import ComparisonRow, comparison_rows, comparison_table
from fedgradnorm.report.page import write_report

__all__ = ["ComparisonRow", "comparison_rows", "comparison_table", "write_report"]
