"""The backends' pulse."""
