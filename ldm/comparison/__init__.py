"""Runs beside each other on one page of HTML that needs nothing but itself."""
