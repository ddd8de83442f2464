"""From a checked map to files: the adapter, its tests."""
