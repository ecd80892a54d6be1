"""What improves a simulation between preparation and conversion."""
