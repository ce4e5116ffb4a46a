"""The folder of a run: what it leaves there, and where."""
