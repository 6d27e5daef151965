"""The runs behind the book: configurations, records, studies and their verdicts."""
