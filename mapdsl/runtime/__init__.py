"""What compiled adapters run on: torch and nothing else of mapdsl."""
