"""One loss term per file."""
