"""Processes that train together: groups, launch, DDP, FSDP2."""
